"""Which URLs and addresses web hooks may have: everything that is not surely public is refused."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

import pytest

from cffa_core.errors import InvalidSettings, InvalidSpec
from cffa_core.settings import Settings
from cffa_core.webhooks.addresses import AddressRefused, Lookup, Policy, Target, system_lookup

PUBLIC = ("1.1.1.1", "8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001:80b::200e",
          "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1")  # fmt: skip
NOT_PUBLIC = (
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255"),
    *("192.168.1.1", "169.254.169.254", "169.254.170.2", "100.64.0.1", "100.100.100.200", "168.63.129.16"),
    *("192.0.0.192", "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.7", "203.0.113.9", "224.0.0.1"),
    *("239.255.255.250", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "fe80::1"),
    *("fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fd20:ce::254", "ff02::1", "ff0e::1", "2001:db8::1", "3fff::1"),
    *("2001::1", "2001:0:7f00:1::", "2002:7f00:1::1", "2002:a9fe:a9fe::", "64:ff9b::127.0.0.1"),
    *("64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "100::1", "5f00::1", "4000::1", "fec0::1"),
)
STRICT = Policy()


def never(host: str, port: int) -> list[str]:
    raise AssertionError(f"{host} was looked up")


def always(*found: str) -> Lookup:
    return lambda host, port: list(found)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_may_be_connected_to(address: str) -> None:
    assert STRICT.may_connect(ipaddress.ip_address(address))
    named = STRICT.target("https://example.org/hook")
    assert STRICT.addresses(named, always(address)) == (address,)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_other_addresses_may_not(address: str) -> None:
    assert not STRICT.may_connect(ipaddress.ip_address(address))
    with pytest.raises(AddressRefused):
        STRICT.addresses(STRICT.target("https://example.org/hook"), always("8.8.8.8", address))
    literal = f"[{address}]" if ":" in address else address
    with pytest.raises(InvalidSpec) as refused:
        STRICT.target(f"https://{literal}/hook")
    assert refused.value.problems[0].pointer == "/url"


def test_the_table_is_long_enough() -> None:
    assert len(NOT_PUBLIC) >= 40


@pytest.mark.parametrize(
    "url",
    [
        *("", "x", "/hook", "//example.org/hook", "https://", "https:///hook", "https:example.org", "https://.."),
        *("http://example.org/", "ftp://example.org/", "file:///etc/passwd", "gopher://example.org/", "HTTP://a.org"),
        # old notations of 127.0.0.1 and of metadata servers, which a resolver would understand
        *("https://2130706433/", "https://0x7f000001/", "https://0x7f.1/", "https://127.1/", "https://0177.0.0.1/"),
        *("https://017700000001/", "https://127.0.0.1./", "https://0/", "https://0xA9FEA9FE/", "https://1.2.3.4.5/"),
        *(
            "https://[::ffff:7f00:1]/",
            "https://[::1]:8443/",
            "https://[fe80::1%25eth0]/",
            "https://[::1/",
            "https://[]",
        ),
        *("https://[v1.a]/", "https://[2606:4700::1111%251]/"),
        *("https://user@example.org/", "https://user:secret@example.org/", "https://@example.org/"),
        *("https://8.8.8.8@127.0.0.1/", "https://example.org#@127.0.0.1/", "https://example.org/#part"),
        *("https://example.org\\@127.0.0.1/", "https://example.org\t/", "https://example.org/\r\nHost: x"),
        *("https://example.org /", "https://ex ample.org/", "https://１２７.0.0.1/", "https://bücher.example/"),
        *("https://ⓔxample.org/", "https://%31%32%37.0.0.1/", "https://a_b..c/", "https://-a.org/", "https://a-.org/"),
        *("https://example.org:22/", "https://example.org:25/", "https://example.org:0/", "https://example.org:1023/"),
        *("https://example.org:65536/", "https://example.org:-1/", "https://example.org:x/", "https://[8.8.8.8]/"),
        *("https://" + "a" * 64 + ".org/", "https://" + "a." * 130 + "org/", "https://example.org/" + "a" * 2000),
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(InvalidSpec) as refused:
        STRICT.target(url)
    assert [(problem.pointer, problem.code) for problem in refused.value.problems] == [("/url", "bad_url")]


@pytest.mark.parametrize(
    ("url", "target", "authority"),
    [
        ("https://example.org", Target("https", "example.org", 443, "/"), "example.org"),
        ("https://Example.ORG./a/b?c=d&e", Target("https", "example.org", 443, "/a/b?c=d&e"), "example.org"),
        ("https://example.org:8443/%2e%2e", Target("https", "example.org", 8443, "/%2e%2e"), "example.org:8443"),
        ("https://xn--bcher-kva.example/", Target("https", "xn--bcher-kva.example", 443, "/"), "xn--bcher-kva.example"),
        ("https://1.1.1.1:443/", Target("https", "1.1.1.1", 443, "/"), "1.1.1.1"),
        ("https://[2606:4700::1111]:444/", Target("https", "2606:4700::1111", 444, "/"), "[2606:4700::1111]:444"),
    ],
)
def test_urls_that_are_taken(url: str, target: Target, authority: str) -> None:
    found = Policy(ports=((443, 444), (8443, 8443))).target(url)
    assert (found, found.authority) == (target, authority)


@pytest.mark.parametrize("host", ["localhost", "ip6-localhost", "2130706433", "0x7f.1", "127.1"])
def test_what_the_system_takes_for_loopback_is_refused(host: str) -> None:
    """With the system's own look-up, past the check of the URL: addresses decide, not spellings."""
    with pytest.raises(AddressRefused):
        STRICT.addresses(Target("https", host, 443, "/"), system_lookup)


def fails(error: Exception) -> Callable[[str, int], list[str]]:
    def lookup(host: str, port: int) -> list[str]:
        raise error

    return lookup


def test_one_message_for_names_that_do_not_exist_and_names_that_are_not_public() -> None:
    target = STRICT.target("https://inner.example/")
    said = set()
    for lookup in (always(), always("10.0.0.1"), fails(socket.gaierror("no such name")), fails(UnicodeError("bad"))):
        with pytest.raises(AddressRefused) as refused:
            STRICT.addresses(target, lookup)
        said.add(refused.value.message)
    assert len(said) == 1
    assert "10.0.0.1" not in said.pop()


def test_a_literal_address_is_never_looked_up() -> None:
    assert STRICT.addresses(STRICT.target("https://8.8.8.8/"), never) == ("8.8.8.8",)


def test_what_the_operator_names_may_be_reached_and_nothing_else() -> None:
    settings = Settings(
        webhook_allow_http=True, webhook_ports="9000, 8000-8100", webhook_allow_networks="10.1.2.0/24, 127.0.0.0/8,::/0"
    )
    policy = Policy.of(settings)
    assert policy.target("http://10.1.2.3:8100/").port == 8100
    assert policy.addresses(policy.target("http://inner:9000/"), always("10.1.2.3")) == ("10.1.2.3",)
    assert policy.may_connect(ipaddress.ip_address("::ffff:127.0.0.1"))
    for address in (
        "10.1.3.1",
        "169.254.169.254",
        "::ffff:169.254.169.254",
        "fe80::1",
        "fd00:ec2::254",
        "::",
        "ff02::1",
    ):
        assert not policy.may_connect(ipaddress.ip_address(address)), address
    with pytest.raises(InvalidSpec, match="port 8101"):
        policy.target("http://10.1.2.3:8101/")
    assert Policy.of(Settings()) == STRICT


@pytest.mark.parametrize(
    "wrong",
    [{"webhook_ports": ports} for ports in ("x", "0", "443-80", "70000", "1-")]
    + [{"webhook_allow_networks": "10.1.2.3/8"}],
)
def test_settings_that_say_nothing_sensible_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(InvalidSettings, match="CFFA_WEBHOOK_PORTS"):
        Policy.of(Settings(**wrong))  # type: ignore[arg-type]
