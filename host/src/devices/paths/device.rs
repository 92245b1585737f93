//! A VM's device for paths of the host, as the build sees it: a process.

use std::path::Path;

use super::Shown;
use crate::devices::inputs::{SUBCOMMAND, StartError, THIS_PROGRAM, listen};
use crate::machine::jail::{Child, Program, Spawner};
use crate::machine::vmm::{Cause, Death, PATHS_SOCKET};

/// A running device. Dropping it kills its process.
#[derive(Debug)]
pub struct Device {
    child: Child,
}

impl Device {
    /// Starts the device of one VM, which shows these. When this returns, a VMM can connect to [`PATHS_SOCKET`] in the run
    /// directory.
    ///
    /// # Errors
    ///
    /// See [`StartError`].
    pub async fn start(spawner: &Spawner, run_dir: &Path, shown: Vec<Shown>) -> Result<Self, StartError> {
        let program = Program::new("paths' device", THIS_PROGRAM, run_dir).arg(SUBCOMMAND);
        let program = program.descriptor(listen(run_dir, PATHS_SOCKET)?);
        let program = shown.into_iter().fold(program, |program, shown| program.descriptor(shown.file));
        Ok(Self { child: spawner.spawn(program).await? })
    }

    /// Waits until its process has ended. Cancel safe, and can be called again.
    pub async fn died(&mut self) -> Death {
        Death::of(&mut self.child, Cause::Process).await
    }

    /// Kills the process, if it still runs, and waits until it has gone.
    pub async fn kill(&mut self) {
        self.child.kill().await;
    }
}
