//! One build: its root, its command, its outputs.

use std::time::Duration;

use cofferdam_protocol::{FromGuest, Specification, Step};

use crate::{
    boot::{self, Modules},
    cgroup::Cgroup,
    command::{self, Command},
    error::{Context as _, SessionError, SetupError},
    host::Host,
    outputs,
    root::{self, Root},
    scratch::Scratch,
    terminal::Terminal,
    watch,
};

/// A build whose command has ended.
pub(crate) struct EndedBuild {
    pub(crate) specification: Specification,
    pub(crate) root: Root,
    pub(crate) cgroup: Cgroup,
}

/// Runs the build, and reports its end. Sends its outputs if it succeeded.
pub(crate) fn run(
    host: &mut Host,
    scratch: Result<Scratch, SetupError>,
    mut specification: Specification,
) -> Result<EndedBuild, SessionError> {
    boot::set_clock(Duration::from_nanos(specification.unix_time_ns)).context(Step::Start, || "set the clock")?;
    if specification.network {
        Modules::Network.load().context(Step::Start, || "load the network's kernel modules")?;
    }
    let mut scratch = scratch?;
    let plan = root::plan(&specification)?;
    let root = root::assemble(&plan, &specification)?;
    // They have been written to the root by now, and the build needs the memory.
    specification.additional_files = Vec::new();
    specification.secrets = Vec::new();
    if specification.user_namespaces {
        // None is of use without a process in it.
        boot::allow_user_namespaces(specification.processes).context(Step::Start, || "allow user namespaces")?;
    }
    let mut command = Command::new(&specification, &root)?;
    let cgroup = Cgroup::create("build", specification.processes)?;
    let running = match &specification.terminal {
        None => command::start(&command, &cgroup)?,
        Some(asked) => {
            command.set_term(&specification, &asked.term)?;
            command::start_interactive(Terminal::open(&root, asked.size)?, &command, &cgroup)?
        }
    };
    let report = watch::run(host, running, &mut scratch, &cgroup)?;
    let succeeded = report.succeeded();
    host.send(&FromGuest::Exited(report))?;
    if succeeded {
        root.remove_secrets()?;
        host.send_batch(|writer| outputs::send(writer, &specification))?;
    }
    Ok(EndedBuild { specification, root, cgroup })
}
