//! Fuzz targets for every decoder of untrusted bytes.
//!
//! A target must hold for any bytes: no panic, no hang, bounded memory, and accepted bytes must survive encoding.
//! `fuzz_targets` has a program for each, as cargo-fuzz expects, and `corpus` the inputs worth keeping. `cargo test`
//! replays the corpus, and the seeds with every kind of small damage; `just fuzz` looks for new inputs.

use std::path::PathBuf;

pub mod castore;
pub mod devices;
pub mod host;
pub mod network;
pub mod nix;

/// A fuzz target.
#[derive(Clone, Copy)]
pub struct Target {
    /// The name of its program, and of its folder in the corpus.
    pub name: &'static str,
    /// Decodes, and panics if the decoder is wrong. Returns whether the bytes were accepted.
    pub run: fn(&[u8]) -> bool,
    /// Valid inputs.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

impl Target {
    /// Its committed inputs.
    pub fn corpus(&self) -> PathBuf {
        PathBuf::from_iter([env!("CARGO_MANIFEST_DIR"), "corpus", self.name])
    }
}

/// Every target.
pub const TARGETS: &[Target] = &[
    Target { name: "directory", run: castore::directory, seeds: castore::directory_seeds },
    Target { name: "chunk_list", run: castore::chunk_list, seeds: castore::chunk_list_seeds },
    Target { name: "chunk", run: castore::chunk, seeds: castore::chunk_seeds },
    Target { name: "tree_object", run: castore::tree_object, seeds: castore::tree_object_seeds },
    Target { name: "nar", run: castore::nar, seeds: castore::nar_seeds },
    Target { name: "tar", run: castore::tar, seeds: castore::tar_seeds },
    Target { name: "address", run: castore::address, seeds: castore::address_seeds },
    Target { name: "digest", run: castore::digest, seeds: castore::digest_seeds },
    Target { name: "request", run: host::request, seeds: host::request_seeds },
    Target { name: "json_request", run: host::json_request, seeds: host::json_request_seeds },
    Target { name: "build_message", run: host::build_message, seeds: host::build_message_seeds },
    Target { name: "input_request", run: host::input_request, seeds: host::input_request_seeds },
    Target { name: "image_document", run: host::image_document, seeds: host::image_document_seeds },
    Target { name: "network_request", run: network::request, seeds: network::request_seeds },
    Target { name: "network_packets", run: network::packets, seeds: network::packets_seeds },
    Target { name: "network_queues", run: network::queues, seeds: network::queues_seeds },
    Target { name: "dns_message", run: network::dns_message, seeds: network::dns_message_seeds },
    Target { name: "server_name", run: network::server_name, seeds: network::server_name_seeds },
    Target { name: "nix_derivation", run: nix::derivation_text, seeds: nix::derivation_text_seeds },
    Target { name: "nix_messages", run: nix::messages, seeds: nix::messages_seeds },
    Target { name: "vmm_events", run: host::vmm_events, seeds: host::vmm_events_seeds },
    Target { name: "plain_text", run: host::plain_text, seeds: host::plain_text_seeds },
    Target { name: "log_as_html", run: host::log_as_html, seeds: host::log_as_html_seeds },
    Target { name: "guest_frames", run: host::guest_frames, seeds: host::guest_frames_seeds },
    Target { name: "conversation", run: host::conversation, seeds: host::conversation_seeds },
    Target { name: "guest_tree", run: host::guest_tree, seeds: host::guest_tree_seeds },
    Target { name: "fuse_request", run: devices::fuse_request, seeds: devices::fuse_request_seeds },
    Target { name: "paths_request", run: devices::paths_request, seeds: devices::paths_request_seeds },
    Target { name: "descriptor_chain", run: devices::descriptor_chain, seeds: devices::descriptor_chain_seeds },
];

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use super::*;

    #[test]
    fn seeds_are_accepted_and_damaged_ones_do_no_harm() {
        for target in TARGETS {
            let seeds = (target.seeds)();
            assert!(!seeds.is_empty(), "{} has no seeds", target.name);
            for seed in seeds {
                assert!((target.run)(&seed), "{} does not accept its seed {}", target.name, seed.escape_ascii());
                for at in (0..seed.len()).step_by(seed.len().div_ceil(64).max(1)) {
                    (target.run)(&seed[..at]);
                    let mut changed = seed.clone();
                    changed[at] ^= 0x81;
                    (target.run)(&changed);
                }
            }
        }
    }

    #[test]
    fn the_corpus_does_no_harm() {
        for target in TARGETS {
            let files =
                fs::read_dir(target.corpus()).unwrap().map(|file| file.unwrap().path()).collect::<BTreeSet<_>>();
            assert!(!files.is_empty(), "{} has no corpus", target.name);
            let mut accepted = 0;
            for file in files {
                // libtest shows it if the target panics.
                println!("{}", file.display());
                accepted += u32::from((target.run)(&fs::read(file).unwrap()));
            }
            assert!(accepted > 0, "{} accepts nothing of its corpus", target.name);
        }
    }

    /// A program that is missing in Cargo.toml would never be compiled.
    #[test]
    fn every_target_has_its_program() {
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        let manifest = fs::read_to_string(package.join("Cargo.toml")).unwrap();
        let names: BTreeSet<_> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
        let declared =
            manifest.lines().filter_map(|line| line.strip_prefix("path = \"fuzz_targets/")?.strip_suffix(".rs\""));
        assert_eq!(declared.map(str::to_owned).collect::<BTreeSet<_>>(), names);
        let programs = fs::read_dir(package.join("fuzz_targets")).unwrap();
        let programs = programs.map(|file| file.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned());
        assert_eq!(programs.collect::<BTreeSet<_>>(), names);
        let corpora = fs::read_dir(package.join("corpus")).unwrap();
        let corpora = corpora.map(|folder| folder.unwrap().file_name().into_string().unwrap());
        assert_eq!(corpora.collect::<BTreeSet<_>>(), names);
    }
}
