import ipaddress

import pytest

from images.addresses import checked_addresses, may_dial, parse_url
from shards.errors import BadData

PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "2606:4700::1",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "2a00:1450::5efe:808:808",
]
PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "172.31.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "::1",
    "fd12::1",
    "::ffff:10.0.0.1",
]
NEVER = [
    *("0.0.0.0", "0.1.2.3", "255.255.255.255", "224.0.0.1", "240.0.0.1", "169.254.169.254", "198.18.0.1"),
    *("192.0.0.192", "192.0.2.1", "192.88.99.1", "100.100.100.200", "168.63.129.16"),
    *("::", "::127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808"),
    *("2002:a9fe:a9fe::1", "2002:808:808::1", "2001:0:a9fe:a9fe::1", "2001:db8::1", "3fff::1", "5f00::1"),
    *(
        "fe80::1",
        "fe80::1%eth0",
        "2606:4700::1%1",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
        "fd00:ec2::254",
        "100::1",
    ),
    *("::ffff:0:127.0.0.1", "2a00:1450::5efe:127.0.0.1", "2a00:1450::200:5efe:10.0.0.1", "4000::1"),
]


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses_may_be_dialled(text: str) -> None:
    assert may_dial(ipaddress.ip_address(text), False) and may_dial(ipaddress.ip_address(text), True)


@pytest.mark.parametrize("text", PRIVATE)
def test_private_ones_only_where_allowed(text: str) -> None:
    assert not may_dial(ipaddress.ip_address(text), False)
    assert may_dial(ipaddress.ip_address(text), True)


@pytest.mark.parametrize("text", NEVER)
def test_some_never(text: str) -> None:
    assert not may_dial(ipaddress.ip_address(text), False)
    assert not may_dial(ipaddress.ip_address(text), True)


def test_one_bad_answer_condemns_the_name() -> None:
    assert checked_addresses(["8.8.8.8", "2606:4700::1", "8.8.8.8"], False) == ("8.8.8.8", "2606:4700::1")
    for found in (["8.8.8.8", "127.0.0.1"], ["8.8.8.8", "not an address"]):
        with pytest.raises(BadData) as caught:
            checked_addresses(found, False)
        assert caught.value.code == "address_blocked"


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("HTTP://Example.COM./a b?c=d e#f", "http://example.com/a%20b?c=d%20e"),
        ("https://example.com:443", "https://example.com/"),
        ("http://example.com:443/", "http://example.com:443/"),
        ("http://example.com?x", "http://example.com/?x"),
        ("http://münchen.example/ä%C3%A4", "http://xn--mnchen-3ya.example/%C3%A4%C3%A4"),
        ("http://a_b-.example/", "http://a_b-.example/"),
        ("http://[2606:4700::1]:8080/x", "http://[2606:4700::1]:8080/x"),
        ("http://example.com/../@b:c@/;p=1", "http://example.com/@b:c@/;p=1"),
        ("http://example.com#@127.0.0.1/", "http://example.com/"),
        ("http://127。0。0。1/", "http://127.0.0.1/"),
    ],
)
def test_what_is_asked_for(url: str, asked: str) -> None:
    target = parse_url(url)
    assert target.url == asked
    assert parse_url(target.url) == target
