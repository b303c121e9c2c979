"""A Google Cloud Storage in this process: what gcsfs, google-cloud-storage and TensorStore use of its JSON API.

Strict where runs depend on it: generations and their preconditions, also of reads, listing in pages, 404 for what is
not there. https://cloud.google.com/storage/docs/json_api/v1/objects and .../request-preconditions say what it must do.
"""

import base64
import contextlib
import email
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse

import google_crc32c

PAGE = 20  # objects; the real one has 1000
ROUTES = {
    "bucket": r"/storage/v1/b/([^/]+)",
    "objects": r"(?:/upload|/resumable/upload)?/storage/v1/b/([^/]+)/o",
    "rewrite": r"/storage/v1/b/([^/]+)/o/(.+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.+)",
    "move": r"/storage/v1/b/([^/]+)/o/(.+)/moveTo/o/(.+)",
    "object": r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)",
    "batch": r"/batch/storage/v1",
}


class Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class FakeGcs:
    """objects: {name: (data, generation)} of the one bucket, "bucket". Use it as a context.

    trouble(method, path) is asked before each request, and says what befalls it: None, a status, "refuse" (the
    connection is closed) or "lose" (it is done, and the connection is closed instead of an answer).
    """

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.requests: list[str] = []
        self.trouble = lambda method, path: None
        self.uploads: dict[str, dict] = {}  # resumable ones
        self.lock = threading.RLock()
        self.generations = itertools.count(1_000_000)
        handler = type("Handler", (_Handler,), {"gcs": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        # What leads the three clients here, and nowhere else: no credentials are looked for.
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "GCE_METADATA_HOST": "127.0.0.1:1",
            "NO_GCE_CHECK": "true",
        }

    def __enter__(self) -> "FakeGcs":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def read(self, name: str) -> bytes:
        return self.objects[name][0]

    def names(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def put(self, name: str, data: bytes, query: dict | None = None) -> dict:
        with self.lock:
            self.require(name, query or {})
            self.objects[name] = (bytes(data), next(self.generations))
            return self.resource(name)

    def delete(self, name: str, query: dict | None = None) -> None:
        with self.lock:
            self.require(name, query or {})
            if name not in self.objects:
                raise Refused(404, f"No such object: bucket/{name}")
            del self.objects[name]

    def require(self, name: str, query: dict) -> None:
        """The preconditions. A generation of 0 stands for an object that is not there."""
        generation = self.objects[name][1] if name in self.objects else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            raise Refused(304, "Not Modified")

    def resource(self, name: str) -> dict:
        data, generation = self.objects[name]
        crc = base64.b64encode(google_crc32c.Checksum(data).digest()).decode()
        return {
            "kind": "storage#object", "name": name, "bucket": "bucket", "id": f"bucket/{name}/{generation}",
            "generation": str(generation), "metageneration": "1", "size": str(len(data)), "crc32c": crc, "etag": crc,
            "contentType": "application/octet-stream", "storageClass": "STANDARD",
            "timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip

    def listing(self, query: dict) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        found: dict[str, str | None] = {}  # in order: a name, or a prefix that stands for many
        for name in self.names(prefix):
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            found.setdefault(prefix + head + cut if cut else name, "prefix" if cut else None)
        begin = [key for key in found if key > query.get("pageToken", "")]
        if "startOffset" in query:
            begin = [key for key in begin if key >= query["startOffset"]]
        if "endOffset" in query:
            begin = [key for key in begin if key < query["endOffset"]]
        page = begin[: min(PAGE, int(query.get("maxResults", PAGE)))]
        answer = {"kind": "storage#objects", "items": [self.resource(key) for key in page if not found[key]]}
        answer["prefixes"] = [key for key in page if found[key]]
        return answer | ({"nextPageToken": page[-1]} if len(page) < len(begin) else {})


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 100

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # of a client that was killed
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    gcs: FakeGcs
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def answer_request(self) -> None:
        parsed = urllib.parse.urlsplit(self.path)
        self.query = {key: values[-1] for key, values in urllib.parse.parse_qs(parsed.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.gcs.requests.append(f"{self.command} {self.path}")
        trouble = self.gcs.trouble(self.command, urllib.parse.unquote(self.path))
        if trouble == "refuse":
            self.close_connection = True
            return
        if isinstance(trouble, int):
            self.fail(trouble, "trouble")
            return
        self.lost = trouble == "lose"
        for name, pattern in ROUTES.items():
            if match := re.fullmatch(pattern, parsed.path):
                arguments = [urllib.parse.unquote(group) for group in match.groups()]
                try:
                    if arguments and arguments[0] != "bucket":
                        raise Refused(404, "The specified bucket does not exist.")
                    with self.gcs.lock:
                        getattr(self, name)(*arguments[1:])
                except Refused as error:
                    self.fail(error.status, str(error))
                return
        self.fail(501, f"not known here: {self.command} {self.path}")

    do_GET = do_POST = do_PUT = do_DELETE = answer_request

    def bucket(self) -> None:
        self.reply({"kind": "storage#bucket", "name": "bucket", "id": "bucket", "locationType": "region"})

    def objects(self) -> None:
        if self.command == "GET":
            self.reply(self.gcs.listing(self.query))
        elif "upload_id" in self.query:
            self.go_on_with_upload(self.query["upload_id"])
        elif self.query["uploadType"] == "media":
            self.reply(self.gcs.put(self.query["name"], self.body, self.query))
        elif self.query["uploadType"] == "multipart":
            described, content = _parts(self.headers["Content-Type"], self.body)
            name = self.query.get("name") or json.loads(described)["name"]
            self.reply(self.gcs.put(name, content, self.query))
        else:
            name = self.query.get("name") or json.loads(self.body)["name"]
            upload = str(len(self.gcs.uploads))
            self.gcs.uploads[upload] = {"name": name, "query": self.query, "data": b""}
            self.reply({}, Location=f"{self.gcs.address}{self.path}&upload_id={upload}")

    def go_on_with_upload(self, number: str) -> None:
        """A part that comes again, since its answer was lost, changes nothing."""
        upload = self.gcs.uploads[number]
        sent = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"])
        if sent[1] is not None and int(sent[1]) <= len(upload["data"]) and not upload.get("done"):
            upload["data"] = upload["data"][: int(sent[1])] + self.body
        if sent[2] == "*" or len(upload["data"]) < int(sent[2]):
            received = {"Range": f"bytes=0-{len(upload['data']) - 1}"} if upload["data"] else {}
            self.reply(b"", 308, **received)
            return
        if "done" not in upload:
            upload["done"] = self.gcs.put(upload["name"], upload["data"], upload["query"])
        self.reply(upload["done"])

    def rewrite(self, name: str, bucket: str, other: str) -> None:
        if name not in self.gcs.objects:
            raise Refused(404, f"No such object: bucket/{name}")
        resource = self.gcs.put(other, self.gcs.objects[name][0], self.query)
        if "copyTo" in self.path:
            self.reply(resource)
        else:
            size = resource["size"]
            self.reply({"done": True, "totalBytesRewritten": size, "objectSize": size, "resource": resource})

    def move(self, name: str, other: str) -> None:
        if name not in self.gcs.objects:
            raise Refused(404, f"No such object: bucket/{name}")
        resource = self.gcs.put(other, self.gcs.objects[name][0], self.query)
        self.gcs.delete(name)
        self.reply(resource)

    def object(self, name: str) -> None:
        if self.command == "DELETE":
            self.gcs.delete(name, self.query)
            self.reply(b"", 204)
            return
        if self.command != "GET":
            raise Refused(501, self.command)
        if name not in self.gcs.objects:
            if int(self.query.get("ifGenerationMatch", 0)):
                raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
            raise Refused(404, f"No such object: bucket/{name}")
        self.gcs.require(name, self.query)
        data, generation = self.gcs.objects[name]
        if self.query.get("generation", str(generation)) != str(generation):
            raise Refused(404, f"No such object: bucket/{name}")
        if self.query.get("alt") != "media":
            self.reply(self.gcs.resource(name))
            return
        headers = {"X-Goog-Generation": str(generation), "X-Goog-Storage-Class": "STANDARD"}
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = wanted.groups()
            begin = int(first) if first else max(0, len(data) - int(last))
            end = min(len(data), int(last) + 1) if first and last else len(data)
            if begin >= end:
                raise Refused(416, "The requested range cannot be satisfied.")
            self.reply(data[begin:end], 206, **headers, **{"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"})
        else:
            self.reply(data, **headers, **{"X-Goog-Hash": f"crc32c={self.gcs.resource(name)['crc32c']}"})

    def batch(self) -> None:
        """Of deletions, as gcsfs makes them."""
        answers = []
        for part in _parts(self.headers["Content-Type"], self.body):
            method, url = part.decode().split()[:2]
            match = re.search(ROUTES["object"], urllib.parse.urlsplit(url).path)
            status = "204 No Content"
            try:
                if method != "DELETE" or match is None:
                    raise Refused(501, f"{method} {url}")
                self.gcs.delete(urllib.parse.unquote(match[2]))
            except Refused as error:
                status = f"{error.status} Refused"
            answers.append(f"--part\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n")
        text = "".join(answers) + "--part--\r\n"
        self.reply(text.encode(), **{"Content-Type": "multipart/mixed; boundary=part"})

    def fail(self, status: int, message: str) -> None:
        error = {"code": status, "message": message, "errors": [{"message": message}]}
        self.reply(b"" if status == 304 else {"error": error}, status)

    def reply(self, body, status: int = 200, **headers: str) -> None:
        if getattr(self, "lost", False):
            self.close_connection = True
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/json" if isinstance(body, dict) else "application/octet-stream"
        headers = {"Content-Type": kind, **headers}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(data)


def _parts(content_type: str, body: bytes) -> list[bytes]:
    message = email.message_from_bytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    return [part.get_payload(decode=True) for part in message.get_payload()]
