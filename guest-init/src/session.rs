//! The conversation with the host, from Hello to Acknowledge. `cofferdam_protocol` shows it as a diagram.

use std::time::Duration;

use cofferdam_protocol::{FromGuest, FromHost, SetupFailure, VERSION, frame::FrameError};
use nix::time::{ClockId, clock_gettime};

use crate::{
    boot::{BootError, Modules},
    build,
    error::SessionError,
    host::Host,
    outputs, rehearsal, root,
    scratch::Preparation,
    shell,
};

/// Connects to the host and runs the one build of this machine.
pub(crate) fn run() -> Result<(), SessionError> {
    let other = |source| BootError::Other { action: "start a thread", source };
    let scratch = Preparation::start().map_err(other)?;
    Modules::Machine.load().map_err(|source| BootError::Other { action: "load a kernel module", source })?;
    let mut host = Host::connect().map_err(FrameError::Io)?;
    // Before the greeting, since a machine that hangs after it isn't booted again.
    let scratch = scratch.finish();
    let inputs = root::mount_inputs();
    host.send(&FromGuest::Hello { version: VERSION, uptime_us: uptime_us() })?;
    host.report_panics().map_err(FrameError::Io)?;
    let mut has_rehearsed = false;
    let specification = loop {
        match host.receive()? {
            FromHost::Specification(specification) => break specification,
            FromHost::Ping => {
                if !std::mem::replace(&mut has_rehearsed, true) {
                    rehearsal::run();
                }
                host.send(&FromGuest::Pong)?;
            }
            _ => return Err(SessionError::Unexpected { expected: "a specification" }),
        }
    };
    let build = match build::run(&mut host, inputs.and(scratch), specification) {
        Ok(build) => Some(build),
        Err(SessionError::Setup(error)) => {
            host.send(&FromGuest::SetupFailed(SetupFailure { step: error.step, detail: &error.detail() }))?;
            None
        }
        Err(error) => return Err(error),
    };
    loop {
        match (host.receive_answer()?, &build) {
            (FromHost::Acknowledge, _) => return Ok(()),
            (FromHost::Keep(limits), Some(build)) => {
                host.send_batch(|writer| outputs::send_kept(writer, &build.root.writable, limits))?;
            }
            (FromHost::Shell { term, size }, Some(build)) => return shell::run(&mut host, build, &term, size),
            // The command has already ended.
            (FromHost::Stop | FromHost::Input(_) | FromHost::Resize(_), _) => {}
            _ => return Err(SessionError::Unexpected { expected: "an acknowledgement" }),
        }
    }
}

fn uptime_us() -> u64 {
    let uptime = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    u64::try_from(uptime.as_micros()).unwrap_or(u64::MAX)
}
