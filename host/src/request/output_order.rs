//! The order in which a client names its outputs.
//!
//! A set of outputs has one digest in whichever order it comes, so equal requests can differ in their order, and an
//! answer to one has to be rearranged for another.

use serde::{Deserialize, Serialize};

use super::RelativePath;

/// For each output, in the order of a request, its rank among them when they are sorted by path; empty if they are sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OutputOrder(Vec<u32>);

impl OutputOrder {
    /// The order of these outputs, which must be unique.
    pub(super) fn of(outputs: &[RelativePath]) -> Self {
        if outputs.is_sorted() {
            return Self::default();
        }
        let mut sorted: Vec<_> = (0..outputs.len()).collect();
        sorted.sort_unstable_by_key(|&index| &outputs[index]);
        let mut ranks = vec![0; outputs.len()];
        for (rank, index) in (0..).zip(sorted) {
            ranks[index] = rank;
        }
        Self(ranks)
    }

    /// Whether it is the sorted order.
    pub fn is_sorted(&self) -> bool {
        self.0.is_empty()
    }

    /// Brings items that are in the order of `from` into this order. `None` if the two are not orders of that many items.
    pub fn arrange<T: Clone>(&self, items: &[T], from: &Self) -> Option<Vec<T>> {
        if self == from {
            return Some(items.to_vec());
        }
        let rank = |order: &Self, index: usize| match order.is_sorted() {
            true => Some(index),
            false => order.0.get(index).map(|&rank| rank as usize),
        };
        if [self, from].iter().any(|order| !order.is_sorted() && order.0.len() != items.len()) {
            return None;
        }
        let mut sorted = vec![None; items.len()];
        for (index, item) in items.iter().enumerate() {
            *sorted.get_mut(rank(from, index)?)? = Some(item);
        }
        (0..items.len()).map(|index| sorted.get(rank(self, index)?).copied().flatten().cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn paths(names: &[&str]) -> Vec<RelativePath> {
        names.iter().map(|name| RelativePath::new(name).unwrap()).collect()
    }

    #[test]
    fn an_answer_to_one_order_is_an_answer_to_another() {
        let sorted = OutputOrder::of(&paths(&["a", "b", "c"]));
        let other = OutputOrder::of(&paths(&["c", "a", "b"]));
        assert!(sorted.is_sorted() && !other.is_sorted());
        assert_eq!(other.arrange(&['A', 'B', 'C'], &sorted).unwrap(), ['C', 'A', 'B']);
        assert_eq!(sorted.arrange(&['C', 'A', 'B'], &other).unwrap(), ['A', 'B', 'C']);
        assert_eq!(other.arrange(&['C', 'A', 'B'], &other).unwrap(), ['C', 'A', 'B']);
    }

    #[test]
    fn an_invalid_order_is_ignored() {
        let sorted = OutputOrder::default();
        for ranks in [vec![0, 0], vec![0, 2], vec![1], vec![1, 0, 2]] {
            let damaged = OutputOrder(ranks);
            let there = damaged.arrange(&['A', 'B'], &sorted);
            let back = sorted.arrange(&['A', 'B'], &damaged);
            assert!(there.is_none() || back.is_none(), "{damaged:?}: {there:?}, {back:?}");
        }
    }

    proptest! {
        #[test]
        fn each_output_keeps_its_item(names in proptest::collection::btree_set("[a-c/]{1,4}", 0..8), seed: u64) {
            let sorted: Vec<_> = names.iter().filter_map(|name| RelativePath::new(name).ok()).collect();
            let mut one = sorted.clone();
            let by = seed as usize % one.len().max(1);
            one.rotate_left(by);
            let mut other = sorted;
            other.sort_unstable_by_key(|path| blake3::hash(&[path.as_str().as_bytes(), &seed.to_le_bytes()].concat()).to_hex());
            let arranged = OutputOrder::of(&other).arrange(&one, &OutputOrder::of(&one)).unwrap();
            prop_assert_eq!(arranged, other);
        }
    }
}
