use std::sync::Arc;

use parking_lot::Mutex;
use tonic::Request;

use crate::{
    Client, Refusal,
    share::{Exhausted, Permit, Share, Shares},
};

/// Bytes of a budget.
const BUDGET_BYTES: usize = 1 << 30;

/// Memory for the messages of clients. Each client gets at most half of it. Services share it by cloning it.
#[derive(Debug, Clone)]
pub struct MemoryBudget {
    shares: Shares,
    bytes: usize,
    share_bytes: usize,
}

impl Default for MemoryBudget {
    fn default() -> Self {
        Self::new(BUDGET_BYTES)
    }
}

impl MemoryBudget {
    pub(crate) fn new(bytes: usize) -> Self {
        let share_bytes = bytes / 2;
        Self { shares: Shares::new(bytes, share_bytes), bytes, share_bytes }
    }

    pub(crate) fn of(&self, client: &Client) -> MemoryShare {
        MemoryShare { share: self.shares.of(client), bytes: self.bytes, share_bytes: self.share_bytes }
    }
}

/// One client's part of a budget.
#[derive(Debug)]
pub(crate) struct MemoryShare {
    share: Share,
    bytes: usize,
    share_bytes: usize,
}

impl MemoryShare {
    fn try_take(&self, bytes: usize) -> Result<Permit, Refusal> {
        self.share.try_take(bytes).map_err(|exhausted| match exhausted {
            Exhausted::Share => Refusal::NoMemory { who: "a client", limit: self.share_bytes },
            Exhausted::Total => Refusal::NoMemory { who: "all clients", limit: self.bytes },
        })
    }
}

/// A permit for the memory of a request. Keep a copy with the request: dropping the last one frees the memory.
#[derive(Debug, Clone, Default)]
pub struct MemoryPermit(Arc<Mutex<Option<Permit>>>);

impl MemoryPermit {
    /// The permit that came with a request, or none if the request is a stream: its messages are not for keeping.
    pub fn of<T>(request: &Request<T>) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_default()
    }

    /// Takes more memory.
    pub(crate) fn extend(&self, share: &MemoryShare, bytes: usize) -> Result<(), Refusal> {
        let more = share.try_take(bytes)?;
        let mut permit = self.0.lock();
        match &mut *permit {
            Some(permit) => permit.merge(more),
            none => *none = Some(more),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back_with_the_last_copy_of_its_permit() {
        let budget = MemoryBudget::new(20);
        let share = budget.of(&Client::User(1));
        let permit = MemoryPermit::default();
        permit.extend(&share, 4).unwrap();
        permit.extend(&share, 3).unwrap();
        let copy = permit.clone();
        drop(permit);
        MemoryPermit::default().extend(&share, 4).unwrap_err();
        drop(copy);
        MemoryPermit::default().extend(&share, 10).unwrap();
    }

    #[test]
    fn a_refusal_tells_whose_memory_is_used_up() {
        let budget = MemoryBudget::new(20);
        let [one, two, three] = [1, 2, 3].map(|uid| budget.of(&Client::User(uid)));
        let permits = [(); 3].map(|()| MemoryPermit::default());
        permits[0].extend(&one, 10).unwrap();
        let refused = permits[0].extend(&one, 1).unwrap_err();
        assert_eq!(refused, Refusal::NoMemory { who: "a client", limit: 10 });
        permits[1].extend(&two, 8).unwrap();
        let refused = permits[2].extend(&three, 3).unwrap_err();
        assert_eq!(refused, Refusal::NoMemory { who: "all clients", limit: 20 });
        permits[2].extend(&three, 2).unwrap();
    }
}
