//! The template of the scratch disk: a small, empty ext4 that the guest grows to the size of its disk.
//!
//! Growing (`EXT4_IOC_RESIZE_FS`) writes only the bookkeeping of the new space, so one template of some kilobytes serves
//! every size, and no mkfs runs in the guest.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Command;

use crate::command::{self, CommandError};

/// Size of the template, and the smallest scratch disk, in bytes.
pub const SCRATCH_TEMPLATE_BYTES: u64 = 16 << 20;

const BLOCK_BYTES: u64 = 4096;

/// Inodes in each 128 MiB: one for each 8 KiB, so that small disks have room for many small files.
const INODES_PER_GROUP: u64 = 16384;

/// Up to which size the template reserves room for group descriptors, in bytes.
const GROWS_TO_BYTES: u64 = 1 << 40;

/// No journal and no checksums: the disk lives as long as one build and nothing reads it afterwards. What a journal would
/// have to survive ends the build. `uninit_bg` leaves inode tables unwritten; `resize_inode` is what growing needs.
const FEATURES: &str = "none,sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr,extent,flex_bg,huge_file,\
                        uninit_bg,dir_nlink,extra_isize";

/// Any constant: mke2fs would take random ones, and the image could not be made the same again.
const UUID: &str = "c0ffe4da-0000-4000-8000-000000000001";

/// Why the template could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// The file could not be made.
    #[error("could not create the scratch template")]
    Create(#[source] io::Error),
    /// mke2fs did not do it.
    #[error("could not format the scratch template")]
    Format(#[source] CommandError),
}

/// Writes the template; equal bytes for equal versions of mke2fs.
pub(crate) fn write_template(path: &Path) -> Result<(), ScratchError> {
    let file = File::create_new(path).map_err(ScratchError::Create)?;
    file.set_len(SCRATCH_TEMPLATE_BYTES).map_err(ScratchError::Create)?;
    let extended = format!(
        "resize={},hash_seed={UUID},root_owner=0:0,lazy_itable_init=1,nodiscard,assume_storage_prezeroed=1",
        GROWS_TO_BYTES / BLOCK_BYTES
    );
    let mut mke2fs = Command::new("mke2fs");
    // The host's own defaults must not show; /sbin is where Debian has mke2fs and not in every user's PATH.
    mke2fs.env("MKE2FS_CONFIG", "/dev/null").env("E2FSPROGS_FAKE_TIME", "1").env("PATH", search_path());
    mke2fs.args(["-q", "-F", "-t", "ext4", "-m", "0", "-I", "256", "-L", "scratch", "-U", UUID, "-O", FEATURES]);
    mke2fs.args(["-b", &BLOCK_BYTES.to_string(), "-N", &INODES_PER_GROUP.to_string(), "-E", &extended]);
    command::output(mke2fs.arg(path)).map(drop).map_err(ScratchError::Format)
}

/// mke2fs's name and version, which decide about the template's bytes.
pub(crate) fn formatter_version() -> Result<String, ScratchError> {
    // Prints to standard error.
    let output = Command::new("sh").args(["-c", "exec mke2fs -V 2>&1"]).env("PATH", search_path()).output();
    let output = output
        .map_err(|source| ScratchError::Format(CommandError::NotStarted { program: "mke2fs".to_owned(), source }))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}

fn search_path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}
