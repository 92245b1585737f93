//! A VM's device for paths of the host, from the outside.

use std::path::Path;

use async_trait::async_trait;
use cofferdam_protocol::PATHS_TAG;

use super::Shown;
use crate::devices::kind::{FS_QUEUE_SIZE, Kind};
use crate::devices::process::{Process, StartError};
use crate::machine::jail::Spawner;
use crate::machine::{self, Attachment, AttachmentKind, Death};

/// The socket in the run directory on which it listens.
const SOCKET: &str = "paths.sock";

/// A running device.
#[derive(Debug)]
pub struct Device(Process);

impl Device {
    /// Starts the device of one VM, which shows these.
    ///
    /// # Errors
    ///
    /// See [`StartError`].
    pub async fn start(spawner: &Spawner, run_dir: &Path, shown: Vec<Shown>) -> Result<Self, StartError> {
        let shown = shown.into_iter().map(|shown| shown.file.into()).collect();
        Ok(Self(Process::start((spawner, run_dir), Kind::Paths, SOCKET, shown).await?))
    }
}

#[async_trait]
impl machine::Device for Device {
    fn attachment(&self) -> Attachment {
        let kind = AttachmentKind::Fs { tag: PATHS_TAG };
        Attachment { kind, socket: SOCKET, queue_size: FS_QUEUE_SIZE }
    }

    async fn died(&mut self) -> Death {
        self.0.died().await
    }

    async fn kill(&mut self) {
        self.0.kill().await;
    }
}
