//! The guest's first file system: guest-init, a static shell and the kernel's modules.
//!
//! ```text
//!   /init             guest-init
//!   /sh               the shell for builds that ask for /bin/sh
//!   /modules.order    the files in /lib to load, one a line, in order; empty if the kernel has everything built in
//!   /scratch.order    the same, for the scratch disk
//!   /network.order    the same, for builds with a network
//!   /kvm.order        the same, for builds that ask for /dev/kvm
//!   /lib/*.ko         the modules
//!   /dev/console      the kernel opens it for /init before anything is mounted
//!   /build-root …     empty mount points
//! ```
//!
//! It is not compressed, so the minimal kernel needs no decompressor. The eight megabytes more make no measurable
//! difference to a boot, even under emulation.

use std::collections::BTreeMap;

use crate::modules::Module;
use crate::newc::Archive;

/// Mount points.
const DIRECTORIES: &[&str] = &["build-root", "inputs", "mnt", "proc", "run", "scratch", "sys"];

/// Modules in the order to load them, and the name of the file that lists them.
pub(crate) type List = (&'static str, Vec<Module>);

/// Makes the archive. It depends on the arguments only.
pub(crate) fn archive(init: &[u8], shell: &[u8], lists: &[List]) -> Vec<u8> {
    let mut archive = Archive::default();
    archive.directory("dev", 0o755);
    archive.character_device("dev/console", 0o600, 5, 1);
    for name in DIRECTORIES {
        archive.directory(name, 0o755);
    }
    archive.directory("tmp", 0o1777);
    archive.file("init", 0o755, init);
    archive.file("sh", 0o755, shell);
    archive.directory("lib", 0o755);
    let modules = lists.iter().flat_map(|(_, modules)| modules).map(|module| (&module.name, &module.contents));
    for (name, contents) in modules.collect::<BTreeMap<_, _>>() {
        archive.file(&format!("lib/{name}.ko"), 0o644, contents);
    }
    for (name, modules) in lists {
        let order: String = modules.iter().map(|module| format!("{}.ko\n", module.name)).collect();
        archive.file(name, 0o644, order.as_bytes());
    }
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(archive: &[u8], text: &str) -> usize {
        archive.windows(text.len()).position(|window| window == text.as_bytes()).unwrap()
    }

    #[test]
    fn modules_are_listed_in_load_order_and_after_their_directory() {
        let modules = ["virtio", "fuse"].map(|name| Module { name: name.into(), contents: b"ELF".to_vec() });
        let lists = [("modules.order", modules[..1].to_vec()), ("kvm.order", modules.to_vec())];
        let archive = archive(b"init", b"sh", &lists);
        position(&archive, "kvm.order\0virtio.ko\nfuse.ko\n");
        position(&archive, "modules.order\0virtio.ko\n\0");
        assert!(position(&archive, "lib\0") < position(&archive, "lib/virtio.ko\0"));
    }

    #[test]
    fn equal_inputs_produce_equal_bytes() {
        assert_eq!(archive(b"init", b"sh", &[]), archive(b"init", b"sh", &[]));
    }
}
