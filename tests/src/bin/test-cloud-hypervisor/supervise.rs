//! Runs a plan: starts one machine after the other, and ends a machine whose tests make no progress.

use std::{
    cell::Cell,
    ffi::OsString,
    io::{self, PipeWriter},
    os::fd::OwnedFd,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use cofferdam_tests::nested::Outer;
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    join,
    net::unix::pipe,
    process::{Child, Command},
    select,
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{sleep, timeout},
};

use crate::{inside::Test, plan::Plan};

/// Where tests run.
#[derive(Debug)]
pub(crate) enum Place {
    /// In a process on this machine, whose KVM works.
    Here,
    /// In an emulated machine.
    Outer(Outer),
}

/// The machines for a plan's tests, and their time limits.
#[derive(Debug)]
pub(crate) struct Supervisor<'a> {
    pub(crate) place: Place,
    /// The program that runs tests in a machine. Its last arguments are the tests.
    pub(crate) command: Vec<OsString>,
    pub(crate) tests: &'a [Test],
    /// A machine counts as hung if no test begins or ends for so long.
    pub(crate) stall_limit: Duration,
    /// Time limit for all machines together.
    pub(crate) time_limit: Duration,
}

impl Supervisor<'_> {
    /// Runs the plan to its end. Gives up at the time limit, and on SIGINT or SIGTERM. Leaves no machine behind.
    pub(crate) async fn run(&self, plan: &mut Plan) -> Result<()> {
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let reason = select! {
            result = self.run_machines(plan) => return result,
            _ = interrupt.recv() => "interrupted".to_owned(),
            _ = terminate.recv() => "terminated".to_owned(),
            () = sleep(self.time_limit) => format!("{} were not enough", humantime::format_duration(self.time_limit)),
        };
        plan.give_up(reason);
        Ok(())
    }

    async fn run_machines(&self, plan: &mut Plan) -> Result<()> {
        while let Some(names) = plan.next_machine() {
            println!("a fresh machine runs {} of {} tests", names.len(), self.tests.len());
            let mut command = self.command.clone();
            for name in &names {
                let test = self.tests.iter().find(|test| test.name == *name).context("the plan made up a test")?;
                command.extend(["--test".into(), test.argument()]);
            }
            let reason = self.run_machine(plan, &command).await?;
            plan.machine_ended(reason);
        }
        Ok(())
    }

    /// Runs a command in a fresh machine and passes each event to the plan. Returns what happened to tests that still ran.
    async fn run_machine(&self, plan: &mut Plan, command: &[OsString]) -> Result<&'static str> {
        let (output, writer) = io::pipe()?;
        let mut lines = BufReader::new(pipe::Receiver::from_owned_fd(OwnedFd::from(output))?).split(b'\n');
        let (moved, mut last_move) = watch::channel(());
        let reading = async {
            while let Some(line) = lines.next_segment().await? {
                let line = String::from_utf8_lossy(&line);
                println!("{line}");
                if line.parse().is_ok_and(|event| plan.see(&event)) {
                    moved.send_replace(());
                }
            }
            anyhow::Ok(())
        };
        let hung = Cell::new(false);
        let stalled = async {
            while timeout(self.stall_limit, last_move.changed()).await.is_ok() {}
            hung.set(true);
            format!("no test has begun or ended for {}", humantime::format_duration(self.stall_limit))
        };
        // The output ends once the machine is gone.
        let (ran, read) = join!(self.place.run(command, writer, stalled), reading);
        read?;
        let Err(error) = ran else { return Ok("its machine ended") };
        println!("{error:#}");
        Ok(if hung.get() { "its machine hung" } else { "its machine died" })
    }
}

impl Place {
    /// Runs a command until it ends, or until `overdue` returns a reason to end it.
    async fn run(&self, command: &[OsString], output: PipeWriter, overdue: impl Future<Output = String>) -> Result<()> {
        let Self::Outer(outer) = self else { return run_here(command, output, overdue).await };
        let code = outer.run(command, output, overdue).await?;
        ensure!(code == 0, "what runs the tests failed with exit code {code}");
        Ok(())
    }
}

async fn run_here(command: &[OsString], output: PipeWriter, overdue: impl Future<Output = String>) -> Result<()> {
    let (program, arguments) = command.split_first().context("there is no command")?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).process_group(0);
    let mut group = Group(command.spawn().context("can't start what runs the tests")?);
    // It holds the output.
    drop(command);
    select! {
        status = group.0.wait() => {
            let status = status?;
            ensure!(status.success(), "what runs the tests failed with {status}");
            Ok(())
        }
        why = overdue => bail!(why),
    }
}

/// A process, killed with its group when dropped before its end.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(id) = self.0.id() {
            // It may have ended just now.
            let _ = killpg(Pid::from_raw(id.cast_signed()), Signal::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `script` as the program that runs the tests `x::a` and `x::b`.
    fn run(script: &str, stall_limit: Duration, time_limit: Duration) -> Plan {
        let tests = ["x::a", "x::b"].map(|name| Test { executable: "/x-1".into(), name: name.to_owned() });
        let command = ["sh", "-c", script, "sh"].map(OsString::from).to_vec();
        let supervisor = Supervisor { place: Place::Here, command, tests: &tests, stall_limit, time_limit };
        let mut plan = Plan::new(tests.iter().map(|test| test.name.clone()));
        tokio::runtime::Runtime::new().unwrap().block_on(supervisor.run(&mut plan)).unwrap();
        plan
    }

    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn a_machine_that_hangs_is_ended_and_another_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let mark = directory.path().join("mark");
        // A process of its group holds the output, too.
        let script = format!(
            "echo began x::a; echo 'passed x::a (0 s)'; echo began x::b; \
             if mkdir '{0}'; then sleep 1000 & wait; fi; [ \"$*\" = '--test /x-1=x::b' ] && echo 'passed x::b (0 s)'",
            mark.display()
        );
        let summary = run(&script, Duration::from_secs(2), LONG);
        assert!(summary.passed(), "{summary:?}");
        let summary = summary.summary("X 1", 0);
        assert!(summary.starts_with("passed when tried again: x::b (its machine hung, then passed)\n"), "{summary}");
        assert!(summary.contains(" 2 machines, 1 retry,"), "{summary}");
    }

    #[test]
    fn a_machine_that_dies_costs_the_running_test_a_try() {
        let plan = run("echo began x::a; exit 3", LONG, LONG);
        assert!(!plan.passed());
        let summary = plan.summary("X 1", 0);
        let died = "FAILED: x::a (its machine died, then its machine died, then its machine died)\n";
        assert!(summary.starts_with(died), "{summary}");
        assert!(summary.contains("gave up: 3 machines in a row ended before a test began\n"), "{summary}");
    }

    #[test]
    fn the_time_limit_ends_a_run_that_moves() {
        let plan = run("echo began x::a; exec sleep 1000", LONG, Duration::from_secs(2));
        assert!(!plan.passed());
        assert!(plan.summary("X 1", 0).contains("gave up: 2s were not enough\n"), "{plan:?}");
    }
}
