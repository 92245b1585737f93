//! The names that a build has resolved, by their addresses.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

/// Most addresses of a build. Later ones are not answered.
const MAX_ADDRESSES: usize = 4096;

/// Most names of one address.
const MAX_NAMES: usize = 64;

/// Names by canonical address.
#[derive(Debug, Default)]
pub(super) struct Pins(HashMap<IpAddr, BTreeSet<String>>);

impl Pins {
    /// Notes that an address is a name's. Returns whether there was room for it.
    pub(super) fn add(&mut self, address: IpAddr, name: &str) -> bool {
        if self.0.len() >= MAX_ADDRESSES && !self.0.contains_key(&address) {
            return false;
        }
        let names = self.0.entry(address).or_default();
        names.contains(name) || (names.len() < MAX_NAMES && names.insert(name.to_owned()))
    }

    /// The names of an address.
    pub(super) fn names(&self, address: IpAddr) -> BTreeSet<String> {
        self.0.get(&address).cloned().unwrap_or_default()
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
}
