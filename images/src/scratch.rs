//! The template of the scratch disk: a small, empty ext4 file system that the guest grows to the size of its disk.
//!
//! Growing (`EXT4_IOC_RESIZE_FS`) writes only metadata. So one template with some kilobytes of data is enough for every
//! size, and the guest needs no mkfs.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Command;

use crate::command::{self, CommandError};

/// Size of the template, in bytes. It is also the minimum size of a scratch disk.
pub const SCRATCH_TEMPLATE_BYTES: u64 = 16 << 20;

const BLOCK_BYTES: u64 = 4096;

/// Inodes per block group of 128 MiB: one per 8 KiB, so that small disks can have many small files.
const INODES_PER_GROUP: u64 = 16384;

/// Features of the file system. It has no journal and no checksums, because a crash that they would guard against ends
/// the build, and nothing reads the disk afterwards. `uninit_bg` leaves inode tables unwritten. With `meta_bg` group
/// descriptors are beside their groups. The alternative, `resize_inode`, reserves blocks for all that may ever come, and
/// growing reads them one after the other.
const FEATURES: &str = "none,sparse_super,large_file,filetype,meta_bg,dir_index,ext_attr,extent,flex_bg,huge_file,\
                        uninit_bg,dir_nlink,extra_isize";

/// An arbitrary constant. mke2fs would choose a random UUID, and no two images would be the same.
const UUID: &str = "c0ffe4da-0000-4000-8000-000000000001";

/// Why the template could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// The file could not be created.
    #[error("could not create the scratch template")]
    Create(#[source] io::Error),
    /// mke2fs failed.
    #[error("could not format the scratch template")]
    Format(#[source] CommandError),
}

/// Writes the template. It depends on the version of mke2fs only.
pub(crate) fn write_template(path: &Path) -> Result<(), ScratchError> {
    let file = File::create_new(path).map_err(ScratchError::Create)?;
    file.set_len(SCRATCH_TEMPLATE_BYTES).map_err(ScratchError::Create)?;
    let extended = format!("hash_seed={UUID},root_owner=0:0,lazy_itable_init=1,nodiscard,assume_storage_prezeroed=1");
    let mut mke2fs = Command::new("mke2fs");
    // The host's configuration of mke2fs is ignored. Debian has mke2fs in /sbin, which not every user has in PATH.
    mke2fs.env("MKE2FS_CONFIG", "/dev/null").env("E2FSPROGS_FAKE_TIME", "1").env("PATH", search_path());
    mke2fs.args(["-q", "-F", "-t", "ext4", "-m", "0", "-I", "256", "-L", "scratch", "-U", UUID, "-O", FEATURES]);
    mke2fs.args(["-b", &BLOCK_BYTES.to_string(), "-N", &INODES_PER_GROUP.to_string(), "-E", &extended]);
    command::output(mke2fs.arg(path)).map(drop).map_err(ScratchError::Format)
}

/// Name and version of mke2fs, on which the template depends.
pub(crate) fn formatter_version() -> Result<String, ScratchError> {
    // mke2fs prints its version to standard error.
    let output = Command::new("sh").args(["-c", "exec mke2fs -V 2>&1"]).env("PATH", search_path()).output();
    let output = output
        .map_err(|source| ScratchError::Format(CommandError::NotStarted { program: "mke2fs".to_owned(), source }))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}

fn search_path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}
