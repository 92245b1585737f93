//! A device's process from the outside: how each is started, watched and ended.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::kind::{Kind, SUBCOMMAND};
use crate::machine::jail::{Child, Program, SpawnError, Spawner, View};
use crate::machine::{Cause, Death, bind};

/// This very program, even if its file has been replaced since it was started.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// A device could not be started.
#[derive(Debug, thiserror::Error)]
#[error("can't start the {device}")]
pub struct StartError {
    /// Which one.
    pub device: Kind,
    /// Why.
    #[source]
    cause: StartCause,
}

/// Why a device could not be started.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartCause {
    /// Its vhost-user socket could not be bound.
    #[error("can't listen on {socket} in {}", .run_dir.display())]
    Listen {
        /// The socket.
        socket: &'static str,
        /// The run directory.
        run_dir: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A connection to it, or the thread that answers it.
    #[error("can't prepare to answer its requests")]
    Answer(#[source] io::Error),
    /// Its process.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
}

impl StartCause {
    pub(super) fn of(self, device: Kind) -> StartError {
        StartError { device, cause: self }
    }
}

/// The process of one device. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Process(Child);

impl Process {
    /// Starts the process of a device, with these descriptors of its own. When this returns, a VMM can connect to `socket` in
    /// the run directory.
    pub(super) async fn start(
        (spawner, run_dir): (&Spawner, &Path),
        device: Kind,
        socket: &'static str,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self, StartError> {
        Self::start_with((spawner, run_dir), device, &[], socket, descriptors).await
    }

    /// As [`start`](Self::start), with arguments behind the device.
    pub(super) async fn start_with(
        (spawner, run_dir): (&Spawner, &Path),
        device: Kind,
        arguments: &[&str],
        socket: &'static str,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self, StartError> {
        let program = program(device, run_dir).args(arguments.iter().copied());
        Self::start_program(spawner, program, (run_dir, socket), descriptors).await.map_err(|cause| cause.of(device))
    }

    /// Starts a process that no VMM connects to, with these descriptors from 3 on.
    pub(super) async fn start_beside(
        (spawner, run_dir): (&Spawner, &Path),
        device: Kind,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self, StartError> {
        let program = descriptors.into_iter().fold(program(device, run_dir), Program::descriptor);
        spawner.spawn(program).await.map(Self).map_err(|error| StartCause::Spawn(error).of(device))
    }

    /// Starts a program in the place of a device.
    pub(super) async fn start_program(
        spawner: &Spawner,
        program: Program,
        (run_dir, socket): (&Path, &'static str),
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self, StartCause> {
        let listener = bind(run_dir, socket);
        let listener = listener.map_err(|source| StartCause::Listen { socket, run_dir: run_dir.to_owned(), source })?;
        let program = program.descriptor(listener);
        let program = descriptors.into_iter().fold(program, Program::descriptor);
        Ok(Self(spawner.spawn(program).await?))
    }

    /// Waits until it has ended. Cancel safe, and can be called again.
    pub(super) async fn died(&mut self) -> Death {
        Death::of(&mut self.0, Cause::Process).await
    }

    /// As [`died`](Self::died). If the task that answers it fails first, the process is cut off: the reason stays in `failure`,
    /// and is its last words.
    pub(super) async fn died_or_cut_off(
        &mut self,
        failure: &mut Option<String>,
        failed: impl Future<Output = String>,
    ) -> Death {
        if failure.is_none() {
            tokio::select! {
                biased;
                reason = failed => *failure = Some(reason),
                death = self.died() => return death,
            }
        }
        self.kill().await;
        let death = self.died().await;
        Death { said: failure.clone().unwrap_or_default(), ..death }
    }

    /// Kills it, if it still runs, and waits until it is gone.
    pub(super) async fn kill(&mut self) {
        self.0.kill().await;
    }
}

/// This program as a device.
fn program(device: Kind, run_dir: &Path) -> Program {
    Program::new(device.to_string(), THIS_PROGRAM, run_dir)
        .title(format!("cofferdam: {device} in {}", run_dir.display()))
        .args([SUBCOMMAND, device.argument()])
        .walled(View::nothing())
}
