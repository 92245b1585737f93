//! Runs tests where KVM works, each in a process of its own. Reports each beginning and end on stdout.

use std::{
    fs::File,
    io::{Read, Seek, Write, stdout},
    num::NonZero,
    path::PathBuf,
    process::Stdio,
    str::FromStr,
    thread,
    time::Instant,
};

use anyhow::{Context, Result};
use cofferdam::machine::vmm::{self, Kind};
use futures::{StreamExt, TryStreamExt, stream};
use tokio::process::Command;

use crate::event::{Event, INDENT};

/// One test of one executable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Test {
    pub(crate) executable: PathBuf,
    /// Its name in the executable's list, with its module: `deaths::the_vmm_is_killed`.
    pub(crate) name: String,
}

impl Test {
    /// For a command line; [`FromStr`] reads it.
    pub(crate) fn argument(&self) -> std::ffi::OsString {
        let mut argument = self.executable.clone().into_os_string();
        argument.push("=");
        argument.push(&self.name);
        argument
    }
}

impl FromStr for Test {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (executable, name) = text.rsplit_once('=').ok_or("expected FILE=TEST")?;
        Ok(Self { executable: executable.into(), name: name.to_owned() })
    }
}

/// Runs the tests, as many at a time as there are processors.
///
/// # Errors
///
/// cloud-hypervisor can't be used here, or a test can't be started. A test that fails is no error.
pub(crate) async fn run(tests: &[Test]) -> Result<()> {
    vmm::choose(Some(Kind::CloudHypervisor))?;
    let at_a_time = thread::available_parallelism().map_or(1, NonZero::get);
    stream::iter(tests).map(run_one).buffer_unordered(at_a_time).try_collect().await
}

async fn run_one(test: &Test) -> Result<()> {
    let name = test.name.clone();
    say(&Event::Began { test: name.clone() }, "")?;
    let begun = Instant::now();
    // Not a pipe: a process left by a failing test would keep it open.
    let mut output = tempfile::tempfile().context("can't make a temporary file")?;
    let mut command = Command::new(&test.executable);
    command.args(["--exact", &test.name]).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output.try_clone()?);
    let status = command.kill_on_drop(true).status().await;
    let status = status.with_context(|| format!("can't start {}", test.executable.display()))?;
    let output = read(&mut output)?;
    let seconds = begun.elapsed().as_secs();
    // The executable succeeds, too, if it doesn't know the test.
    if status.success() && output.contains("test result: ok. 1 passed;") {
        say(&Event::Passed { test: name, seconds }, "")
    } else {
        say(&Event::Failed { test: name, seconds }, &format!("{output}\n{status}"))
    }
}

fn read(output: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    output.rewind()?;
    output.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Writes a test's output, if any, and then the event, all at once.
fn say(event: &Event, output: &str) -> Result<()> {
    let mut text: String = output.lines().map(|line| format!("{INDENT}{line}\n")).collect();
    text.push_str(&format!("{event}\n"));
    let mut stdout = stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_survives_the_command_line() {
        let test = Test { executable: "/x=y/system-0123abcd".into(), name: "deaths::the_vmm_is_killed".to_owned() };
        assert_eq!(test.argument().to_str().unwrap().parse(), Ok(test.clone()));
    }
}
