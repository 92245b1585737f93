//! `test-cloud-hypervisor`: the whole-system tests, or the benchmark of a trivial build, with cloud-hypervisor.
//!
//! ```text
//!   compile the tests ──▶ KVM works? ──yes──▶ this program once more, here
//!                             └─ no ──▶ this program once more, in the outer machine, where KVM works
//! ```

use std::{
    env,
    ffi::OsString,
    path::PathBuf,
    process::{ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context, Error, Result, bail, ensure};
use clap::Parser;
use cofferdam::machine::vmm::{self, Kind};
use cofferdam_tests::{guest, image, nested::Outer, patience, program, test_executables};
use tokio::{
    process::Command,
    time::{Instant, timeout_at},
};

/// The exit code when there is no cloud-hypervisor, so that nobody takes it for a success or for a failed test.
const NOT_RUN: u8 = 77;

const VMM_SETTING: &str = "COFFERDAM_CLOUD_HYPERVISOR";

const HOW_TO_GET_IT: &str = "install your distribution's package, or name the static binary of a release \
                             (https://github.com/cloud-hypervisor/cloud-hypervisor/releases) in \
                             COFFERDAM_CLOUD_HYPERVISOR";

/// How much longer things take where the machine under the VMM is emulated, too.
const NESTED_PATIENCE: u32 = 5;

/// Holds four guests at a time and what the tests write.
const NESTED_MEMORY_MIB: u32 = 8192;

/// This version starts machines on processors without XSAVE; v49 does not.
const WITHOUT_XSAVE: u32 = 53;

/// Run the whole-system tests with cloud-hypervisor; where KVM does not work, inside an emulated machine.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// How long all of it may take, once it is compiled
    #[arg(long, default_value = "3h", value_parser = humantime::parse_duration)]
    time_limit: Duration,
    /// A test executable that was compiled before, to run here and now; without any, all are compiled
    #[arg(long = "executable", value_name = "FILE")]
    executables: Vec<PathBuf>,
    /// Measure a trivial build instead
    #[arg(long)]
    bench: bool,
    /// Only tests whose names contain one of these
    filters: Vec<OsString>,
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.executables.is_empty() { prepare(&arguments).await } else { run(&arguments).await }
}

/// Makes all that the tests need and runs them where KVM works.
async fn prepare(arguments: &Arguments) -> Result<ExitCode> {
    let survey = vmm::survey();
    let Some(found) = survey.cloud_hypervisor.found else {
        let what = survey.cloud_hypervisor.missing.first().map_or("it is missing", |missing| &missing.what);
        eprintln!("the tests with cloud-hypervisor did not run: {what}; {HOW_TO_GET_IT}");
        // Whoever names one wants it to be tested.
        return Ok(ExitCode::from(if env::var_os(VMM_SETTING).is_some() { 1 } else { NOT_RUN }));
    };
    println!("cloud-hypervisor {} ({})", found.version, found.program.display());
    // What is compiled below may replace the file, which then is found by its name alone.
    let this = env::current_exe()?;
    // They are found where they are kept.
    guest::compile_all();
    let factor = if survey.kvm.is_ok() { 1 } else { NESTED_PATIENCE };
    let mut command = vec![OsString::from("env")];
    for (key, value) in [
        ("COFFERDAM_BIN", program().as_os_str()),
        ("COFFERDAM_TEST_IMAGE", image().0.as_os_str()),
        (VMM_SETTING, found.program.as_os_str()),
        (cofferdam_tests::vmm::SETTING, "cloud-hypervisor".as_ref()),
        (patience::SETTING, factor.to_string().as_ref()),
    ] {
        let mut assignment = OsString::from(format!("{key}="));
        assignment.push(value);
        command.push(assignment);
    }
    if arguments.bench {
        command.push(this.with_file_name("bench").into());
    } else {
        let limit = humantime::format_duration(arguments.time_limit).to_string();
        command.extend([this.into(), "--time-limit".into(), limit.replace(' ', "").into()]);
        for path in test_executables().map_err(Error::msg)? {
            command.extend(["--executable".into(), path.into()]);
        }
        command.push("--".into());
        command.extend(arguments.filters.iter().cloned());
    }

    let Err(error) = survey.kvm else {
        let status = Command::new(&command[0]).args(&command[1..]).status().await?;
        return Ok(ExitCode::from(if status.success() { 0 } else { 1 }));
    };
    println!("{error}; so the tests run inside an emulated machine, whose KVM works");
    let major = found.version.split('.').next().and_then(|major| major.parse().ok());
    let xsave = major.is_none_or(|major: u32| major < WITHOUT_XSAVE);
    let outer = Outer { memory_mib: NESTED_MEMORY_MIB, time_limit: arguments.time_limit, xsave };
    Ok(ExitCode::from(if outer.run(&command).await? == 0 { 0 } else { 1 }))
}

/// Runs test executables one after the other.
async fn run(arguments: &Arguments) -> Result<ExitCode> {
    let choice = vmm::choose(Some(Kind::CloudHypervisor))?;
    let begun = Instant::now();
    let (mut tests, mut failed) = (0, Vec::new());
    for executable in &arguments.executables {
        match count(executable, &arguments.filters).await? {
            0 => continue,
            number => tests += number,
        }
        let mut running = Command::new(executable).args(&arguments.filters).kill_on_drop(true).spawn()?;
        let Ok(status) = timeout_at(begun + arguments.time_limit, running.wait()).await else {
            let limit = humantime::format_duration(arguments.time_limit);
            bail!("the tests with cloud-hypervisor did not end within {limit}: {} still ran", executable.display());
        };
        if !status?.success() {
            failed.push(executable.file_name().unwrap_or_default().to_string_lossy());
        }
    }
    ensure!(tests > 0, "no test has such a name");
    let took = begun.elapsed().as_secs();
    println!("{tests} whole-system tests ran with cloud-hypervisor {} on KVM in {took} s", choice.version);
    if failed.is_empty() {
        println!("all passed");
        return Ok(ExitCode::SUCCESS);
    }
    println!("these had failures: {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}

/// How many tests an executable will run; none is ignored in this project.
async fn count(executable: &PathBuf, filters: &[OsString]) -> Result<usize> {
    let mut command = Command::new(executable);
    command.args(["--list", "--format", "terse"]).args(filters);
    let listed = command.stderr(Stdio::inherit()).output().await.context("a test executable can't be started")?;
    Ok(String::from_utf8_lossy(&listed.stdout).lines().filter(|line| line.ends_with(": test")).count())
}
