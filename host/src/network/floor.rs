//! The floor: addresses that builds don't reach, whatever names they have.
//!
//! The tables are IANA's of special-purpose addresses, with those that it doesn't list but that are nobody's business
//! either: multicast, IPv4-compatible and site-local addresses, and the address at which Azure's hosts serve their guests.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::address::is_within;

/// Azure's address for a guest's host, in no registry.
const AZURE_HOST: Ipv4Addr = Ipv4Addr::new(168, 63, 129, 16);

/// Networks of IPv4, and what they are for.
const IPV4: [(Ipv4Addr, u8, &str); 16] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8, "this network"),
    (Ipv4Addr::new(10, 0, 0, 0), 8, "private"),
    (Ipv4Addr::new(100, 64, 0, 0), 10, "shared by carriers"),
    (Ipv4Addr::new(127, 0, 0, 0), 8, "loopback"),
    (Ipv4Addr::new(169, 254, 0, 0), 16, "link-local, metadata of clouds"),
    (Ipv4Addr::new(172, 16, 0, 0), 12, "private"),
    (Ipv4Addr::new(192, 0, 0, 0), 24, "of protocols"),
    (Ipv4Addr::new(192, 0, 2, 0), 24, "for documentation"),
    (Ipv4Addr::new(192, 88, 99, 0), 24, "6to4 relays"),
    (Ipv4Addr::new(192, 168, 0, 0), 16, "private"),
    (Ipv4Addr::new(198, 18, 0, 0), 15, "for benchmarks"),
    (Ipv4Addr::new(198, 51, 100, 0), 24, "for documentation"),
    (Ipv4Addr::new(203, 0, 113, 0), 24, "for documentation"),
    (Ipv4Addr::new(224, 0, 0, 0), 4, "multicast"),
    (Ipv4Addr::new(240, 0, 0, 0), 4, "reserved"),
    (AZURE_HOST, 32, "of a cloud's host"),
];

/// The only network of IPv6 with addresses for everybody.
const GLOBAL: (Ipv6Addr, u8) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);

/// Networks within it, and what they are for.
const IPV6: [(Ipv6Addr, u8, &str); 4] = [
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23, "of protocols"),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32, "for documentation"),
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16, "6to4"),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20, "for documentation"),
];

/// NAT64's network that all translators know. Its last 32 bits are an IPv4 address.
const NAT64: (Ipv6Addr, u8) = (Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96);

/// The address that is meant: IPv4 in IPv6 is IPv4.
pub(super) fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// The IPv4 address in an address of NAT64.
pub(super) fn translated(address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V6(inner) if is_within(address, NAT64.0.into(), NAT64.1) => {
            Some(Ipv4Addr::from_bits(inner.to_bits() as u32))
        }
        _ => None,
    }
}

/// What a canonical address is for, if it is below the floor. With `nat64`, an address of that network is as good as the IPv4
/// address in it.
pub(super) fn below(address: IpAddr, nat64: bool) -> Option<&'static str> {
    match address {
        IpAddr::V4(address) => {
            let within = IPV4.iter().find(|(base, prefix, _)| is_within(address.into(), (*base).into(), *prefix));
            within.map(|(_, _, what)| *what)
        }
        IpAddr::V6(address) if is_within(address.into(), NAT64.0.into(), NAT64.1) => {
            let inner = Ipv4Addr::from_bits(address.to_bits() as u32);
            if nat64 { below(inner.into(), nat64) } else { Some("NAT64") }
        }
        IpAddr::V6(address) => {
            if !is_within(address.into(), GLOBAL.0.into(), GLOBAL.1) {
                return Some("not global");
            }
            let within = IPV6.iter().find(|(base, prefix, _)| is_within(address.into(), (*base).into(), *prefix));
            within.map(|(_, _, what)| *what)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_below(address: &str, nat64: bool) -> bool {
        below(canonical(address.parse().unwrap()), nat64).is_some()
    }

    /// The first and the last address of each network, and their neighbours where those are open.
    #[test]
    fn special_networks_are_below_the_floor_to_their_last_address() {
        for (first, last, before, after) in [
            ("0.0.0.0", "0.255.255.255", None, Some("1.0.0.0")),
            ("10.0.0.0", "10.255.255.255", Some("9.255.255.255"), Some("11.0.0.0")),
            ("100.64.0.0", "100.127.255.255", Some("100.63.255.255"), Some("100.128.0.0")),
            ("127.0.0.0", "127.255.255.255", Some("126.255.255.255"), Some("128.0.0.0")),
            ("169.254.0.0", "169.254.255.255", Some("169.253.255.255"), Some("169.255.0.0")),
            ("172.16.0.0", "172.31.255.255", Some("172.15.255.255"), Some("172.32.0.0")),
            ("192.0.0.0", "192.0.0.255", Some("191.255.255.255"), Some("192.0.1.0")),
            ("192.0.2.0", "192.0.2.255", Some("192.0.1.255"), Some("192.0.3.0")),
            ("192.88.99.0", "192.88.99.255", Some("192.88.98.255"), Some("192.88.100.0")),
            ("192.168.0.0", "192.168.255.255", Some("192.167.255.255"), Some("192.169.0.0")),
            ("198.18.0.0", "198.19.255.255", Some("198.17.255.255"), Some("198.20.0.0")),
            ("198.51.100.0", "198.51.100.255", Some("198.51.99.255"), Some("198.51.101.0")),
            ("203.0.113.0", "203.0.113.255", Some("203.0.112.255"), Some("203.0.114.0")),
            ("224.0.0.0", "255.255.255.255", Some("223.255.255.255"), None),
            ("168.63.129.16", "168.63.129.16", Some("168.63.129.15"), Some("168.63.129.17")),
            ("::", "1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", None, Some("2000::")),
            ("2001::", "2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff", Some("2000:ffff::"), Some("2001:200::")),
            ("2001:db8::", "2001:db8:ffff::ffff", Some("2001:db7::"), Some("2001:db9::")),
            ("2002::", "2002:ffff::1", Some("2001:ffff::"), Some("2003::")),
            ("3fff::", "3fff:fff:ffff::", Some("3ffe::"), Some("3fff:1000::")),
            ("4000::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Some("3fff:ffff::"), None),
        ] {
            for address in [first, last] {
                assert!(is_below(address, false), "{address}");
            }
            for address in [before, after].into_iter().flatten() {
                assert!(!is_below(address, false), "{address}");
            }
        }
    }

    #[test]
    fn addresses_in_other_addresses_are_seen() {
        for address in [
            "::ffff:10.0.0.5",
            "::ffff:169.254.169.254",
            "::ffff:127.0.0.1",
            "::93.184.215.14",
            "64:ff9b::169.254.169.254",
            "64:ff9b::93.184.215.14",
            "64:ff9b:1::93.184.215.14",
            "2002:a9fe:a9fe::1",
            "fe80::1",
            "fec0::1",
            "fd00::1",
            "ff02::1",
            "::1",
        ] {
            assert!(is_below(address, false), "{address}");
        }
        assert!(!is_below("::ffff:93.184.215.14", false));
        assert!(!is_below("64:ff9b::93.184.215.14", true));
        assert!(is_below("64:ff9b::169.254.169.254", true) && is_below("64:ff9b:1::93.184.215.14", true));
    }

    #[test]
    fn everybodys_addresses_are_above_it() {
        for address in ["93.184.215.14", "1.1.1.1", "2606:2800:21f::14", "2a00:1450::1"] {
            assert!(!is_below(address, false), "{address}");
        }
    }
}
