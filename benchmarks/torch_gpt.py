"""The other side of `benchmarks/train.py --against=torch`: the same model in plain PyTorch, in a process of its own.

Fused where PyTorch has it fused: attention (scaled_dot_product_attention), one matrix for queries, keys and values,
AdamW. bfloat16 is torch.autocast over float32 parameters. Started by train.py; needs torch and numpy, not llm_jax.
"""

import resource
import time

import numpy as np
import torch
from peers import serve
from torch import nn
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    torch.set_float32_matmul_precision("high")  # TF32, as JAX takes it for float32 there
CEILING_SECONDS, CEILING_TRIES = 0.5, 20


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, epsilon: float):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=epsilon, bias=False)
        self.norm2 = nn.LayerNorm(width, eps=epsilon, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, *, vocab: int, length: int, layers: int, width: int, heads: int, inner: int, epsilon: float):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, inner, epsilon) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=epsilon, bias=False)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                small = (2 * layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * small)

    def forward(self, tokens, targets):
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Torch:
    def make(self, sizes: dict, training: dict) -> dict:
        """training: as train.py's torch_training."""
        torch.manual_seed(0)
        begin = time.perf_counter()
        self.dtype = torch.bfloat16 if training["dtype"] == "bfloat16" else None
        self.model = GPT(**sizes).to(DEVICE)
        self.loss = torch.compile(self.model) if training["compiled"] else self.model
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if p.ndim != 2]
        groups = [
            {"params": matrices, "weight_decay": training["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=training["rate"], betas=training["betas"], eps=training["epsilon"], fused=True
        )
        self.clip = training["clip"]
        rows = np.random.default_rng(training["seed"]).integers(
            0, sizes["vocab"], (training["batches"], training["batch_size"], sizes["length"] + 1)
        )
        self.batches = torch.from_numpy(rows).to(DEVICE)
        self.count = 0
        self.steps(1)
        return {
            "compile": time.perf_counter() - begin,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "dtype": training["dtype"],
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            "version": torch.__version__,
        }

    def steps(self, count: int) -> dict:
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            rows = self.batches[self.count % len(self.batches)]
            with torch.autocast(DEVICE, dtype=self.dtype, enabled=self.dtype is not None):
                loss = self.loss(rows[:, :-1], rows[:, 1:])
            loss.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.count += 1
        value = loss.item()  # waits
        return {
            "seconds": (time.perf_counter() - begin) / count,
            "cpu": (time.process_time() - cpu) / count,
            "loss": value,
        }

    def memory(self) -> float:
        if DEVICE == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def ceilings(self) -> dict:
        """As train.py's."""
        size = 2048 if DEVICE == "cpu" else 8192

        def best(call) -> float:
            seconds = []
            while len(seconds) < CEILING_TRIES or sum(seconds) < CEILING_SECONDS:
                begin = time.perf_counter()
                call()
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begin)
            return min(seconds)

        found = {}
        for dtype in (torch.float32, torch.bfloat16):
            matrix = torch.full((size, size), 1 / size, dtype=dtype, device=DEVICE)
            found[str(dtype).removeprefix("torch.")] = 2 * size**3 / best(lambda matrix=matrix: matrix @ matrix)
        array = torch.zeros(2**26, device=DEVICE)
        target = torch.empty_like(array)
        found["copy"] = 2 * array.nbytes / best(lambda: target.copy_(array))
        return found


if __name__ == "__main__":
    serve(Torch())
