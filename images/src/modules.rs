//! Kernel modules with their dependencies, in an order in which they can be loaded.
//!
//! A Debian package has no `modules.dep`, which is made at installation. The dependencies are read from each module's
//! section `.modinfo`, a list of NUL-terminated `key=value` strings.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use crate::command::{self, CommandError};

/// Why the modules could not be collected.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// A module does not exist.
    #[error("kernel module {name}{} is not in {} and not built in", needed_by(.by), .tree.display())]
    Missing {
        /// The module's name, with underscores.
        name: String,
        /// The module that depends on it.
        by: Option<String>,
        /// The directory that was searched.
        tree: PathBuf,
    },
    /// Modules depend on each other in a cycle.
    #[error("kernel module {name} depends on itself")]
    Cycle {
        /// The module's name.
        name: String,
    },
    /// A file could not be read.
    #[error("could not read {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A compressed module could not be decompressed.
    #[error("could not decompress a kernel module")]
    Decompress(#[source] CommandError),
}

fn needed_by(by: &Option<String>) -> String {
    by.as_ref().map_or_else(String::new, |by| format!(", which {by} needs,"))
}

/// A module that can be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Module {
    /// The kernel's name for it.
    pub(crate) name: String,
    /// The ELF file, decompressed.
    pub(crate) contents: Vec<u8>,
}

/// The modules of one kernel: `lib/modules/<release>`.
#[derive(Debug)]
pub(crate) struct Tree {
    path: PathBuf,
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
}

impl Tree {
    /// Finds the modules, and reads none of them yet.
    pub(crate) fn open(path: &Path) -> Result<Self, ModulesError> {
        let list = path.join("modules.builtin");
        let text = fs::read_to_string(&list).map_err(|source| ModulesError::Read { path: list, source })?;
        let built_in = text.lines().filter_map(|line| module_name(OsStr::new(line.rsplit('/').next()?))).collect();
        let mut files = BTreeMap::new();
        find_modules(&path.join("kernel"), &mut files)?;
        Ok(Self { path: path.to_owned(), files, built_in })
    }

    /// The wanted modules and their dependencies, each after its own dependencies. Built-in modules are left out.
    pub(crate) fn load_order(&self, wanted: &[&str]) -> Result<Vec<Module>, ModulesError> {
        let mut contents = BTreeMap::new();
        let order = order(wanted, |name, by| {
            if self.built_in.contains(name) {
                return Ok(None);
            }
            let Some(file) = self.files.get(name) else {
                let by = by.map(str::to_owned);
                return Err(ModulesError::Missing { name: name.to_owned(), by, tree: self.path.clone() });
            };
            let bytes = without_signature(read_module(file)?);
            let needs = dependencies(&bytes);
            contents.insert(name.to_owned(), bytes);
            Ok(Some(needs))
        })?;
        let take = |name: String| {
            let contents = contents.remove(&name).unwrap_or_default();
            Module { name, contents }
        };
        Ok(order.into_iter().map(take).collect())
    }
}

/// Sorts modules after their dependencies, with a depth-first search. `needs` returns a module's dependencies, or `None`
/// if it is built in.
fn order(
    wanted: &[&str],
    mut needs: impl FnMut(&str, Option<&str>) -> Result<Option<Vec<String>>, ModulesError>,
) -> Result<Vec<String>, ModulesError> {
    /// A module on the current path, and its dependencies that have not been visited yet, in reverse order.
    struct Open {
        name: String,
        waiting: Vec<String>,
    }
    let mut done = BTreeSet::new();
    let mut ordered = Vec::new();
    for root in wanted {
        let mut path: Vec<Open> = Vec::new();
        let mut next = Some((*root).to_owned());
        loop {
            if let Some(name) = next.take() {
                if path.iter().any(|open| open.name == name) {
                    return Err(ModulesError::Cycle { name });
                }
                if done.insert(name.clone()) {
                    let by = path.last().map(|open| open.name.as_str());
                    if let Some(mut waiting) = needs(&name, by)? {
                        waiting.reverse();
                        path.push(Open { name, waiting });
                    }
                }
            }
            let Some(open) = path.last_mut() else { break };
            next = open.waiting.pop();
            if next.is_none() {
                ordered.extend(path.pop().map(|open| open.name));
            }
        }
    }
    Ok(ordered)
}

fn find_modules(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), ModulesError> {
    let failed = |source| ModulesError::Read { path: directory.to_owned(), source };
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().map_err(failed)?.is_dir() {
            find_modules(&entry.path(), files)?;
        } else if let Some(name) = module_name(&entry.file_name()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// The module in a file: `virtio_rng` is in `virtio-rng.ko.xz`.
fn module_name(file: &OsStr) -> Option<String> {
    let (stem, compression) = file.to_str()?.split_once(".ko")?;
    matches!(compression, "" | ".xz" | ".zst" | ".gz").then(|| stem.replace('-', "_"))
}

/// What a distribution appends to a module: its signature, the lengths of that, and this text (`include/linux/module_signature.h`).
const SIGNED: &[u8] = b"~Module signature appended~\n";

/// The bytes between signature and text. The last four are the signature's length.
const SIGNATURE_HEADER_BYTES: usize = 12;

/// A module without its signature. The guest's kernel would check it, which takes longer than to load the module; whoever can change
/// a module in the initramfs can change guest-init.
fn without_signature(mut module: Vec<u8>) -> Vec<u8> {
    let length = |signed: &[u8]| {
        let signature = u32::from_be_bytes(*signed.last_chunk()?) as usize;
        signed.len().checked_sub(SIGNATURE_HEADER_BYTES)?.checked_sub(signature)
    };
    if let Some(length) = module.strip_suffix(SIGNED).and_then(length) {
        module.truncate(length);
    }
    module
}

fn read_module(file: &Path) -> Result<Vec<u8>, ModulesError> {
    let program = match file.extension().and_then(OsStr::to_str) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(file).map_err(|source| ModulesError::Read { path: file.to_owned(), source }),
    };
    command::output(Command::new(program).args(["--decompress", "--stdout"]).arg(file))
        .map_err(ModulesError::Decompress)
}

fn dependencies(module: &[u8]) -> Vec<String> {
    module
        .split(|byte| *byte == 0)
        .filter_map(|text| text.strip_prefix(b"depends="))
        .flat_map(|list| list.split(|byte| *byte == b','))
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ordered(wanted: &[&str], graph: &[(&str, &[&str])]) -> Result<Vec<String>, ModulesError> {
        order(wanted, |name, by| {
            let found = graph.iter().find(|(module, _)| *module == name);
            let Some((_, needs)) = found else {
                let by = by.map(str::to_owned);
                return Err(ModulesError::Missing { name: name.to_owned(), by, tree: PathBuf::from("tree") });
            };
            Ok(Some(needs.iter().map(|name| (*name).to_owned()).collect()))
        })
    }

    #[test]
    fn a_module_comes_once_and_after_its_dependencies() {
        let graph: &[(&str, &[&str])] = &[
            ("virtio", &[]),
            ("virtio_ring", &["virtio"]),
            ("virtio_pci", &["virtio_ring", "virtio"]),
            ("fuse", &[]),
            ("virtiofs", &["fuse", "virtio", "virtio_ring"]),
        ];
        let order = ordered(&["virtiofs", "virtio_pci", "virtio"], graph).unwrap();
        assert_eq!(order, ["fuse", "virtio", "virtio_ring", "virtiofs", "virtio_pci"]);
    }

    #[test]
    fn a_missing_module_is_reported_with_the_one_that_needs_it() {
        let error = ordered(&["virtiofs"], &[("virtiofs", &["fuse"])]).unwrap_err();
        assert_eq!(error.to_string(), "kernel module fuse, which virtiofs needs, is not in tree and not built in");
    }

    #[test]
    fn a_cycle_is_an_error() {
        let error = ordered(&["a"], &[("a", &["b"]), ("b", &["a"])]).unwrap_err();
        assert_eq!(error.to_string(), "kernel module a depends on itself");
    }

    #[test]
    fn a_signature_is_taken_off() {
        let header = [0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 3];
        let signed = [&b"\x7fELF"[..], b"sig", &header, SIGNED].concat();
        assert_eq!(without_signature(signed.clone()), b"\x7fELF");
        for other in [&b"\x7fELF"[..], SIGNED, &signed[6..], &signed[..signed.len() - 1]] {
            assert_eq!(without_signature(other.to_vec()), other);
        }
    }

    #[test]
    fn dependencies_are_read_from_modinfo() {
        let module = b"\x7fELF...\0license=GPL\0depends=fuse,virtio-ring\0retpoline=Y\0";
        assert_eq!(dependencies(module), ["fuse", "virtio_ring"]);
        assert!(dependencies(b"\0depends=\0").is_empty());
    }

    #[test]
    fn modules_are_found_with_dashes_or_underscores() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("kernel/drivers/virtio");
        fs::create_dir_all(&deep).unwrap();
        fs::write(directory.path().join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        fs::write(deep.join("virtio-rng.ko"), b"\0depends=ext4\0").unwrap();
        let order = Tree::open(directory.path()).unwrap().load_order(&["virtio_rng", "ext4"]).unwrap();
        assert_eq!(order, [Module { name: "virtio_rng".into(), contents: b"\0depends=ext4\0".to_vec() }]);
    }
}
