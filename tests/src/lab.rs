//! A host whose internet is made for tests, see `bin/network-lab`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use crate::{Cofferdam, program::network_lab};

/// The internet's record of a test.
#[derive(Debug)]
pub struct Lab {
    program: &'static Path,
    directory: TempDir,
}

impl Lab {
    /// An internet that nobody has seen, made by this program: `env!("CARGO_BIN_EXE_network-lab")`.
    pub fn new(program: &'static str) -> Self {
        Self::by(program.as_ref())
    }

    /// An internet that nobody has seen, for programs that are no tests.
    pub fn compiled() -> Self {
        Self::by(network_lab())
    }

    fn by(program: &'static Path) -> Self {
        Self { program, directory: tempfile::tempdir().expect("a temporary directory can be made") }
    }

    /// A state directory on a host with this internet. Each command has servers of its own.
    pub fn cofferdam(&self) -> Cofferdam {
        Cofferdam::new().by([self.program.into(), self.log().into()])
    }

    /// Connections that servers have accepted, as `ADDRESS PORT`, and queries, as `dns NAME TYPE`, in order.
    pub fn seen(&self) -> Vec<String> {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }

    /// Connections that servers have accepted.
    pub fn connections(&self) -> Vec<String> {
        self.seen().into_iter().filter(|line| !line.starts_with("dns ")).collect()
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("log")
    }
}
