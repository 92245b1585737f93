//! Addresses that stand for names which only a proxy can resolve.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

/// The network of the addresses, which is for benchmarks: no server has one of them.
const FIRST: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);

/// Most names of a build.
const MAX_NAMES: usize = 4096;

/// Names by address. Each name has one address, and each address one name.
#[derive(Debug, Default)]
pub(super) struct StandIns {
    names: Vec<String>,
    indexes: HashMap<String, usize>,
}

impl StandIns {
    /// The address of a name, unless there are too many.
    pub(super) fn address(&mut self, name: &str) -> Option<IpAddr> {
        let index = match self.indexes.get(name) {
            Some(index) => *index,
            None if self.names.len() >= MAX_NAMES => return None,
            None => {
                self.names.push(name.to_owned());
                self.indexes.insert(name.to_owned(), self.names.len() - 1);
                self.names.len() - 1
            }
        };
        Some(Ipv4Addr::from_bits(FIRST.to_bits() + index as u32).into())
    }

    /// The name of an address.
    pub(super) fn name(&self, address: IpAddr) -> Option<&str> {
        let IpAddr::V4(address) = address else { return None };
        let index = address.to_bits().checked_sub(FIRST.to_bits())?;
        self.names.get(index as usize).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_has_an_address_of_its_own_and_there_is_no_room_for_endless_names() {
        let mut known = StandIns::default();
        let addresses: Vec<_> = (0..MAX_NAMES).map(|at| known.address(&format!("{at}.example")).unwrap()).collect();
        assert_eq!(known.address("another.example"), None);
        assert_eq!(known.address("7.example"), Some(addresses[7]));
        for (at, address) in addresses.iter().enumerate() {
            assert_eq!(known.name(*address), Some(format!("{at}.example").as_str()));
        }
        assert_eq!(addresses.last(), Some(&"198.18.16.0".parse().unwrap()));
        for other in ["198.18.0.0", "198.18.16.1", "0.0.0.0", "255.255.255.255", "::1"] {
            assert_eq!(known.name(other.parse().unwrap()), None, "{other}");
        }
    }
}
