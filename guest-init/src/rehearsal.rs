//! A build of nothing, in a machine that waits for its request.
//!
//! What a machine does for the first time takes it long: the kernel reads the disk's tables and makes its own, a program's pages
//! are mapped, an emulator translates the code. A machine in stock has the time for it before there is a request. The rehearsal
//! runs in a child with mounts of its own, so that nothing of it is left.

use std::{fs, io, path::Path, process::exit};

use cofferdam_protocol::{
    Specification, Step,
    frame::{FrameReader, FrameWriter, MAX_FROM_GUEST_BYTES},
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::ForkResult,
};

use crate::{
    cgroup::Cgroup,
    command::{self, Command, MAX_OUTCOME_BYTES, Outcome},
    console,
    error::{Context as _, SessionError},
    layout::{INPUTS, LAYERS, SCRATCH},
    outputs, root, sys,
};

/// The name of its cgroup.
const CGROUP: &str = "rehearsal";

/// What it has in place of the scratch disk: a directory of the disk, so that the kernel reads the disk's tables.
const DISK: &str = "/scratch/layers/rehearsal";

/// Rehearses once. If that fails, so will the build, which then says why.
pub(crate) fn run() {
    if let Err(error) = sys::fork().and_then(|fork| match fork {
        ForkResult::Child => {
            if let Err(error) = rehearse() {
                console::log_error(&error);
            }
            exit(0)
        }
        ForkResult::Parent { child } => sys::wait(Some(child)).map(drop),
    }) {
        console::log(&format!("can't rehearse a build: {error}"));
    }
    Cgroup::remove(CGROUP);
    if let Err(error) = fs::remove_dir_all(DISK) {
        console::log(&format!("can't remove {DISK}: {error}"));
    }
}

fn rehearse() -> Result<(), SessionError> {
    unshare(CloneFlags::CLONE_NEWNS).context(Step::Start, || "make a mount namespace")?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context(Step::Start, || "make the mounts private")?;
    mount(Some("rehearsal"), INPUTS, Some("tmpfs"), MsFlags::empty(), None::<&str>)
        .context(Step::Start, || format!("mount a tmpfs at {INPUTS}"))?;
    fs::create_dir(DISK).context(Step::Start, || format!("make {DISK}"))?;
    mount(Some(DISK), SCRATCH, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .context(Step::Start, || format!("mount {DISK} at {SCRATCH}"))?;
    fs::create_dir(LAYERS).context(Step::Start, || format!("make {LAYERS}"))?;
    fs::create_dir(Path::new(INPUTS).join("bin")).context(Step::Start, || "make an input")?;
    let specification = nothing();
    let root = root::assemble(&root::plan_over_inputs(&specification)?, &specification)?;
    let cgroup = Cgroup::create(CGROUP, specification.processes)?;
    let running = command::start(&Command::new(&specification, &root)?, &cgroup)?;
    let _ = FrameReader::new(&running.outcome, MAX_OUTCOME_BYTES).read::<Outcome>();
    sys::wait(Some(running.init)).context(Step::Start, || "wait for the build's init")?;
    outputs::send(&mut FrameWriter::new(io::sink(), MAX_FROM_GUEST_BYTES), &specification)?;
    Ok(())
}

/// A specification that makes most kinds of mounts, and one output.
fn nothing() -> Specification {
    let text = |text: &str| text.to_owned();
    Specification {
        command_args: vec![text("/bin/sh"), text("-c"), text("echo >file")],
        environment: Vec::new(),
        working_dir: text("build"),
        inputs_dir: text("inputs"),
        scratch_paths: vec![text("build"), text("tmp")],
        additional_files: Vec::new(),
        outputs: vec![text("build/file")],
        provide_bin_sh: true,
        kvm: false,
        host_paths: Vec::new(),
        network: false,
        processes: 64,
        user_namespaces: false,
        ca_file: None,
        secrets: Vec::new(),
        terminal: None,
        unix_time_ns: 0,
    }
}
