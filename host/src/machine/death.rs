//! How a helper process ended.

use std::fmt;
use std::process::ExitStatus;

use super::jail::Child;

/// The cause of a machine's end, as far as its VMM reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// One of its processes ended, which its status explains.
    Process,
    /// Its processes together needed more memory than their cgroup has, so that the kernel killed them.
    Memory,
    /// The guest's kernel panicked, and said so to the panic device.
    Panic,
    /// The guest reset itself: a reboot, a triple fault, or a panic of a kernel that doesn't know the panic device.
    Reset,
}

/// Which process of a machine ended, how, and its last output.
#[derive(Clone, Debug)]
pub struct Death {
    /// The program's name in messages.
    pub program: String,
    /// Its exit status. Success when the guest powered off; killed by us after a panic or a reset.
    pub status: ExitStatus,
    /// The tail of its output and of the guest's console, escaped.
    pub said: String,
    /// The cause.
    pub cause: Cause,
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what())?;
        if self.said.is_empty() { f.write_str(" without output") } else { f.write_str(&last_words(&self.said)) }
    }
}

impl Death {
    /// What happened, without the last words.
    pub fn what(&self) -> String {
        match self.cause {
            Cause::Process => format!("{} died ({})", self.program, self.status),
            Cause::Memory => {
                "the kernel killed the machine's processes: they needed more memory than they may have".to_owned()
            }
            Cause::Panic => "the guest's kernel panicked".to_owned(),
            Cause::Reset => "the guest reset itself".to_owned(),
        }
    }

    /// Waits for the end of a process. Cancel safe, and can be called again.
    pub(crate) async fn of(child: &mut Child, cause: Cause) -> Self {
        let status = child.wait().await;
        let cause = if cause == Cause::Process && child.is_out_of_memory() { Cause::Memory } else { cause };
        Self { program: child.name().to_owned(), status, said: child.said(), cause }
    }
}

/// The last output of a program, as the end of a sentence; nothing if there is none.
pub(super) fn last_words(said: &str) -> String {
    if said.is_empty() { String::new() } else { format!("; its last output: {said}") }
}
