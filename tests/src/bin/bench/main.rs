//! Measures costs as ratios against a peer in the same run. Absolute times mean nothing on a busy or emulated machine.
//!
//! | part | what | peer |
//! |---|---|---|
//! | import | import of a tree of 10,000 files, and again | `cp -r` of it, without and with a sync, which an import includes; BLAKE3 of the files |
//! | image | import of an OCI image of 10,000 files in a layer | `skopeo copy` to a directory, and `tar x` of its layers |
//! | source | a build with `--source` of 10,000 files, in which `find` runs | `cp -r` and `find` on this host, beside a build without |
//! | large | import of one file of 2 GiB | the same |
//! | scan | a scan for 500 needles | the crate `aho-corasick`; BLAKE3 of the bytes |
//! | grpc | 1 GiB put and got over gRPC | a copy to, and from, a file over TCP |
//! | directories | 10,000 directories got over gRPC | the same from the redb file |
//! | cache | many blobs through a cache, cold and warm | the remote store without it; plain files |
//! | views | 10,000 files put into a store whose clients see only their own | into one that everybody sees |
//! | views | 10,000 questions about what another client has | about what nobody has; and the rank test of the two |
//! | build | a trivial build | a bare boot of the same kernel by the same VMM, whose init powers off |
//! | memory | the processes of one idle build, each | the machine's memory |
//! | walls | a trivial build | the same where helper processes can't be walled in |
//! | service | a trivial build by a daemon, from the call to the result, without its VM's time | its VM |
//! | log | 64 MiB of log | as much through a pipe in the VM |
//! | queue | 1,000 requests, until all know their place in the queue | 1,000 health checks |
//! | standby | a trivial build in a standby machine, from the call to the result | a container |
//! | standby | the same until its guest has the request, and until its command's first line comes | a byte's way from a guest to the host and back over vsock |
//! | standby | the same to the result, beside a build that keeps a processor busy | one that boots |
//! | throughput | 30 trivial builds by a daemon, one after the other and 2 at a time, with standby machines and without | as many containers |
//! | throughput | the processor time of one, of the daemon and all its processes | a container's |
//! | network | 256 MiB to a build and from it, and many requests | as much over its loopback interface |
//! | network | 256 MiB to a build while another sends datagrams as fast as it can | while another keeps a processor busy |
//! | network | a trivial build with a network | one without |
//! | network | 10,000 connections in a row | the memory and descriptors before them |
//! | nix | a trivial build by Nix over ssh-ng, without its VM's time | the same as snix asks for it |
//! | nix | a closure of 10,000 files to a daemon and from it by `nix copy` | between two local stores |
//! | inputs | reading 10,000 small inputs | the stock virtiofsd, in the same VM |
//! | compile | compiling Lua with a toolchain among the inputs | the same with everything on a tmpfs of the guest |
//!
//! Containers are made by the `snix-build` that `COFFERDAM_BENCH_SNIX_BUILD` names, with runc, or else by `unshare`.
//!
//! Arguments name the parts to measure. The default is all parts, and with `COFFERDAM_TEST_VMM=cloud-hypervisor` build, walls and
//! memory: most other parts don't depend on the VMM.

use std::env;

use anyhow::{Result, anyhow, bail};
use cofferdam::devices;
use cofferdam_tests::vmm;
use tempfile::TempDir;

mod compile;
mod containers;
mod image;
mod measure;
mod memory;
mod network;
mod nix;
mod service;
mod standby;
mod store;
mod throughput;
mod transfer;
mod tree;
mod views;
mod vm;

type Part = fn(&TempDir) -> Result<()>;

const PARTS: [(&str, Part); 21] = [
    ("import", store::import_tree),
    ("large", store::import_large),
    ("image", image::import_image),
    ("source", image::source_tree),
    ("scan", store::scan),
    ("grpc", transfer::grpc),
    ("directories", transfer::directories),
    ("cache", transfer::cache),
    ("views", views::views),
    ("build", vm::trivial_build),
    ("walls", vm::walls),
    ("memory", memory::idle_build),
    ("service", service::service),
    ("log", service::log),
    ("queue", service::queue),
    ("standby", standby::standby),
    ("throughput", throughput::throughput),
    ("network", network::network),
    ("nix", nix::nix),
    ("inputs", vm::small_inputs),
    ("compile", compile::lua),
];

fn main() -> Result<()> {
    let mut asked: Vec<String> = env::args().skip(1).collect();
    if asked.first().is_some_and(|first| first == devices::SUBCOMMAND) {
        return devices::run(devices::Kind::Inputs, false)
            .map_err(|error| anyhow!("the inputs' device failed: {error}"));
    }
    if asked.is_empty() && vmm::asked() == Some("cloud-hypervisor") {
        asked = ["build", "walls", "memory"].map(str::to_owned).to_vec();
    }
    let names = PARTS.map(|(name, _)| name);
    if let Some(unknown) = asked.iter().find(|name| !names.contains(&name.as_str())) {
        bail!("there is no part {unknown:?}; there are {}", names.join(", "));
    }
    measure::print_head();
    for (name, part) in PARTS {
        if asked.is_empty() || asked.iter().any(|asked| asked == name) {
            part(&tempfile::tempdir()?)?;
        }
    }
    Ok(())
}
