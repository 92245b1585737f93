//! The names that a build has resolved, by their addresses.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

/// Most addresses of a build. Later ones are not answered.
const MAX_ADDRESSES: usize = 4096;

/// Most names of one address.
const MAX_NAMES: usize = 64;

/// Most names of all addresses together: a name counts once for each address.
const MAX_PINS: usize = 8192;

/// Names by canonical address.
#[derive(Debug, Default)]
pub(super) struct Pins {
    names: HashMap<IpAddr, BTreeSet<String>>,
    pins: usize,
}

impl Pins {
    /// Notes that an address is a name's. Returns whether there was room for it.
    pub(super) fn add(&mut self, address: IpAddr, name: &str) -> bool {
        let known = self.names.get(&address);
        if known.is_some_and(|names| names.contains(name)) {
            return true;
        }
        let has_room = known.map_or(self.names.len() < MAX_ADDRESSES, |names| names.len() < MAX_NAMES);
        if self.pins >= MAX_PINS || !has_room {
            return false;
        }
        self.pins += 1;
        self.names.entry(address).or_default().insert(name.to_owned())
    }

    /// The names of an address.
    pub(super) fn names(&self, address: IpAddr) -> BTreeSet<String> {
        self.names.get(&address).cloned().unwrap_or_default()
    }

    /// Whether one of these names has an IPv4 address.
    pub(super) fn have_ipv4(&self, names: &BTreeSet<String>) -> bool {
        self.names.iter().any(|(address, pinned)| address.is_ipv4() && !pinned.is_disjoint(names))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_the_names_that_it_was_found_by() {
        let mut pins = Pins::default();
        let address = |last: u32| IpAddr::from(std::net::Ipv4Addr::from_bits(last));
        assert!(pins.add(address(1), "a") && pins.add(address(1), "b") && pins.add(address(1), "b"));
        assert_eq!(pins.names(address(1)), BTreeSet::from(["a".to_owned(), "b".to_owned()]));
        assert!(pins.names(address(2)).is_empty());
        let names = |name: &str| BTreeSet::from([name.to_owned()]);
        assert!(pins.add("2001:db8::1".parse().unwrap(), "six") && pins.add("2001:db8::2".parse().unwrap(), "a"));
        assert!(pins.have_ipv4(&names("a")) && !pins.have_ipv4(&names("six")));
    }

    #[test]
    fn there_is_no_room_for_endless_names() {
        let mut pins = Pins::default();
        let address = |last: usize| IpAddr::from(std::net::Ipv4Addr::from_bits(last as u32));
        assert!((0..MAX_ADDRESSES).all(|last| pins.add(address(last), "a")));
        assert!(!pins.add(address(MAX_ADDRESSES), "a") && pins.add(address(0), "b"));
        assert!((0..MAX_NAMES - 2).all(|name| pins.add(address(0), &format!("c{name}"))));
        assert!(!pins.add(address(0), "d"));
    }

    #[test]
    fn long_names_of_many_addresses_dont_fill_memory() {
        let mut pins = Pins::default();
        let address = |last: usize| IpAddr::from(std::net::Ipv4Addr::from_bits(last as u32));
        let all = (0..MAX_ADDRESSES).flat_map(|last| (0..MAX_NAMES).map(move |name| (last, name)));
        let room = all.filter(|(last, name)| pins.add(address(*last), &format!("a{name}"))).count();
        assert_eq!(room, MAX_PINS);
        assert!(pins.add(address(0), "a0"), "it is known");
    }
}
