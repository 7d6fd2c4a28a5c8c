"""URLs taken apart strictly, and which addresses this machine connects to for a client."""

from __future__ import annotations

import ipaddress

import pytest

from pixano_edge.engine.provider.errors import InvalidRequestError
from pixano_edge.engine.server.addresses import judge, listed, parse_url


def test_a_url_is_taken_apart() -> None:
    target = parse_url("HTTPS://Images.Example.ORG.:8443/a%20b/ü?q=1&x=[2]#part")
    assert (target.scheme, target.host, target.port) == ("https", "images.example.org", 8443)
    assert target.path == "/a%20b/%C3%BC?q=1&x=[2]"
    assert parse_url("http://example.org").path == "/"
    assert parse_url("http://example.org?x").path == "/?x"
    assert parse_url("http://8.8.8.8/").address == ipaddress.ip_address("8.8.8.8")
    assert parse_url("http://[2606:4700::1111]:81/").address == ipaddress.ip_address("2606:4700::1111")


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.org/a.png",
        "gopher://example.org/",
        "s3://bucket/key",
        "//example.org/a.png",
        "http:///a.png",
        "http://",
        "http://user@example.org/",
        "http://user:secret@example.org/",
        "http://@example.org/",
        "http://example.org:0/",
        "http://example.org:99999/",
        "http://example.org:x/",
        "http://exa mple.org/",
        "http://example.org/a\r\nX: y",
        "http://example.org/\ta",
        " http://example.org/",
        "http://example.org\\@127.0.0.1/",
        "http://example.org/\x00",
        "http://example.org/\u2028",
        "http://exämple.org/",
        "http://①②⑦.⓪.⓪.①/",
        "http://127。0。0。1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.0.0.1/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://127.0.0.1.0x/",
        "http://1.2.3.256/",
        "http://[::1%25lo]/",
        "http://[fe80::1%eth0]/",
        "http://[127.0.0.1]/",
        "http://[v1.fe]/",
        "http://[::1/",
        "http://-example.org/",
        "http://a..b/",
        "http://" + "a" * 64 + ".org/",
        "http://" + "a." * 127 + "org/",
        "http://example.org/" + "a" * 9000,
        "http://127.0.0.1%2f.example.org/",
    ],
)
def test_malformed_and_disguised_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_url(url)
    assert caught.value.action


def test_a_secret_in_a_url_is_not_repeated() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_url("http://user:hunter2@example.org/")
    assert "hunter2" not in str(caught.value)


PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.215.14", "2606:4700::1111", "2a00:1450:4001:80b::200e", "64:ff9b::808:808"]
PRIVATE = [
    "127.0.0.1",
    "127.255.255.254",
    "10.1.2.3",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "100.64.0.1",
    "169.254.1.1",
    "::1",
    "fe80::1",
    "fe80::1%lo",
    "fd12:3456::1",
    "64:ff9b::a01:203",  # NAT64 of 10.1.2.3
]
NEVER = [
    "169.254.169.254",
    "100.100.100.200",
    "168.63.129.16",
    "fd00:ec2::254",
    "64:ff9b::a9fe:a9fe",  # NAT64 of 169.254.169.254
    "0.0.0.0",
    "0.1.2.3",
    "255.255.255.255",
    "240.0.0.1",
    "224.0.0.1",
    "239.255.255.255",
    "192.0.2.1",
    "198.18.0.1",
    "203.0.113.9",
    "192.88.99.1",
    "::",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "::ffff:0:127.0.0.1",
    "64:ff9b:1::7f00:1",
    "2002:7f00:1::1",
    "2001:0:53aa:64c::1",
    "2001:db8::1",
    "2001:20::1",
    "3fff::1",
    "2a00:1450::5efe:7f00:1",
    "2a00:1450::200:5efe:a00:1",
    "ff02::1",
    "ff0e::1",
    "fec0::1",
    "100::1",
    "5f00::1",
]


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses_pass(text: str) -> None:
    assert judge(ipaddress.ip_address(text), False) == ""
    assert judge(ipaddress.ip_address(text), True) == ""


@pytest.mark.parametrize("text", PRIVATE)
def test_private_addresses_pass_only_where_they_are_allowed(text: str) -> None:
    assert judge(ipaddress.ip_address(text), False)
    assert judge(ipaddress.ip_address(text), True) == ""


@pytest.mark.parametrize("text", NEVER)
def test_metadata_services_tunnels_and_reserved_addresses_never_pass(text: str) -> None:
    assert judge(ipaddress.ip_address(text), False)
    assert judge(ipaddress.ip_address(text), True)


def test_lists_of_hosts() -> None:
    assert listed("a.example.org", ["*.example.org"])
    assert listed("example.org", ["Example.org."])
    assert listed("::1", ["[::1]"])
    assert not listed("example.org", ["*.example.org"])
    assert not listed("badexample.org", ["*.example.org", "example.org"])
    assert not listed("example.org.evil.net", ["example.org", "*.example.org"])
    assert not listed("anything", ["*", "*.", ""])
