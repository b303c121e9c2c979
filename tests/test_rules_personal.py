"""Personal data in lines of known contents, in real lines, and called again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wet_pages import line_of_a_page, pages

from llm_jax.corpus.rules.personal import Personal, is_card_number

REPLACED = [
    ("mail O'Neil.x+y@Sub.example.co.uk, now", "mail <email>, now"),
    ("请联系foo@bar.com请", "请联系<email>请"),
    ("from 93.184.216.34:80 to (12.34.56.78).", "from <ip>:80 to (<ip>)."),
    ("at 2a00:1450:4001:81b::200e or 2600:1406:5e00:6:0:0:17ce:bc1b.", "at <ip> or <ip>."),
    ("+49 30 1234567, (+44) (0)20 7946 0958; +33 1 23 45 67 89", "<phone>, <phone>; <phone>"),
    ("+12125550123 0049 30 123456", "<phone> <phone>"),
    ("(212) 555-0123 212-555-0123 212.555.0123 1-800-555-0199", "<phone> <phone> <phone> <phone>"),
    ("Tel.: 030 123 45 67, call us now at 5551234.", "Tel.: <phone>, call us now at <phone>."),
    ("Phone (02) 9876 5432 fax:01234/567890", "Phone <phone> fax:<phone>"),
    ("4111 1111 1111 1111, 4111111111111111 378282246310005", "<card>, <card> <card>"),
    ("3782 822463 10005 5500-0000-0000-0004", "<card> <card>"),
]
KEPT = [
    "logo@2x.png, user@host, @handle.name",
    "192.168.1.1 10.0.0.1 127.0.0.1 300.1.1.1 v1.20.30.40 1.20.30.40.50 8.8.8.8",
    "fe80::1 2001:db8::1 20:15:30 2019:10:11 std::string",
    "on 2018-10-15 20:40:37, 15.10.2018 - 17.10.2018, 1998-2004",
    "$1,234,567.89, 10 000 000 EUR, 12.345.678,90, 100 200 3000",
    "ISBN 978-3-16-148410-0, id 0012345678, no. 12345678901234",
    "2010 2011 2012 2013, +100000000 points, 212-555-01234",
    "4111 1111 1111 1112",  # checksum
]
REAL = [
    ("Telefon: +49 6135 9323-0", "Telefon: <phone>"),
    ("Tel.:\u00a0044 826 76 76", "Tel.:\u00a0<phone>"),
    ("RBB Valdivia +56 6 3228 3380", "RBB Valdivia <phone>"),
    ("(808) 847-3246", "<phone>"),
    ("Telefon: 0341/696290", "Telefon: <phone>"),
]


@pytest.mark.parametrize(("text", "expected"), REPLACED)
def test_replaced(text, expected):
    assert Personal()(text) == expected


@pytest.mark.parametrize("text", KEPT)
def test_kept(text):
    assert Personal()(text) == text


@pytest.mark.parametrize(("text", "expected"), REAL)
def test_real_lines(text, expected):
    assert Personal()(line_of_a_page(text)) == expected


def test_counts():
    text = "a@b.org, c@d.org, 93.184.216.34, +49 30 1234567, 4111111111111111"
    expected = {"email": 2, "ip": 1, "phone": 1, "card": 1}
    assert Personal().replace(text) == ("<email>, <email>, <ip>, <phone>, <card>", expected)


@given(st.from_regex(r"4[0-9]{14}", fullmatch=True))
def test_exactly_one_check_digit_in_ten(digits):
    assert sum(is_card_number(f"{digits}{check}") for check in range(10)) == 1


@given(
    st.lists(
        st.sampled_from(
            [*(text for text, _ in REPLACED), *KEPT, *"0159+().-–/:@#<> \n", "phone ", "2001:", ".com", "49"]
        )
    ).map("".join)
)
def test_called_again_it_finds_nothing(text):
    once = Personal()(text)
    assert Personal().replace(once) == (once, {"email": 0, "ip": 0, "phone": 0, "card": 0})


def test_real_pages():
    """As counted when 45 of the phone numbers had been read by a person; of the IP addresses, 2 are versions."""
    total = {"email": 0, "ip": 0, "phone": 0, "card": 0}
    for _, text in pages():
        for kind, count in Personal().replace(text)[1].items():
            total[kind] += count
    assert total == {"email": 687, "ip": 5, "phone": 336, "card": 0}
