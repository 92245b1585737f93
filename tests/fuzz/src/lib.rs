//! One target for each decoder of foreign bytes.
//!
//! A target must hold for any bytes: no panic, no hang, no more memory than its limits, and what was taken must come out
//! again as it came in. The seeds are what the decoders should take; `cargo test` runs each target on its own, and on all
//! that can be made of them by cutting off an end or changing a byte.

mod castore;
mod host;

/// Names the one to run to `fuzz-target`.
pub const TARGET_VARIABLE: &str = "COFFERDAM_FUZZ_TARGET";

/// A decoder.
#[derive(Clone, Copy)]
pub struct Target {
    /// As on the command line.
    pub name: &'static str,
    /// Decodes; panics when something is wrong with the decoder. Says whether the bytes were taken.
    pub run: fn(&[u8]) -> bool,
    /// Bytes that are taken, to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "directory", run: castore::directory, seeds: castore::directory_seeds },
    Target { name: "chunk-list", run: castore::chunk_list, seeds: castore::chunk_list_seeds },
    Target { name: "chunk", run: castore::chunk, seeds: castore::chunk_seeds },
    Target { name: "tree-object", run: castore::tree_object, seeds: castore::tree_object_seeds },
    Target { name: "nar", run: castore::nar, seeds: castore::nar_seeds },
    Target { name: "tar", run: castore::tar, seeds: castore::tar_seeds },
    Target { name: "address", run: castore::address, seeds: castore::address_seeds },
    Target { name: "digest", run: castore::digest, seeds: castore::digest_seeds },
    Target { name: "request", run: host::request, seeds: host::request_seeds },
    Target { name: "json-request", run: host::json_request, seeds: host::json_request_seeds },
    Target { name: "build-message", run: host::build_message, seeds: host::build_message_seeds },
    Target { name: "input-request", run: host::input_request, seeds: host::input_request_seeds },
    Target { name: "vmm-events", run: host::vmm_events, seeds: host::vmm_events_seeds },
    Target { name: "plain-text", run: host::plain_text, seeds: host::plain_text_seeds },
    Target { name: "guest-frames", run: host::guest_frames, seeds: host::guest_frames_seeds },
    Target { name: "guest-tree", run: host::guest_tree, seeds: host::guest_tree_seeds },
];

/// The target of this name.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.iter().find(|target| target.name == name).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_is_taken_and_nothing_near_it_does_harm() {
        for target in TARGETS {
            let seeds = (target.seeds)();
            assert!(!seeds.is_empty(), "{} has no seeds", target.name);
            for seed in seeds {
                assert!((target.run)(&seed), "{} does not take its seed {}", target.name, seed.escape_ascii());
                for at in (0..seed.len()).step_by(seed.len().div_ceil(64).max(1)) {
                    (target.run)(&seed[..at]);
                    let mut changed = seed.clone();
                    changed[at] ^= 0x81;
                    (target.run)(&changed);
                }
            }
        }
    }
}
