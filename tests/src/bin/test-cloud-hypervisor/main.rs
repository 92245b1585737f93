//! `test-cloud-hypervisor`: the whole-system tests, or the benchmark of a trivial build, with cloud-hypervisor.
//!
//! ```text
//!   compile and list the tests ──▶ supervise: KVM works? ──yes──▶ inside: this program once more, here
//!                                                    └─ no ──▶ inside: this program once more, in an outer machine
//!   plan   ◀── began, passed, FAILED (event) ◀── the output
//!     └──▶ a fresh machine for the tests that are left
//! ```

mod event;
mod inside;
mod plan;
mod supervise;

use std::{
    env,
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Error, Result, ensure};
use clap::Parser;
use cofferdam::machine::vmm;
use cofferdam_tests::{
    DEBIAN_IMAGE_SETTING, debian_image, guest, image, nested::Outer, patience, program, test_executable,
};
use tokio::{process::Command, time::sleep};

use inside::Test;
use plan::Plan;
use supervise::{Place, Supervisor};

/// The exit code without cloud-hypervisor. It differs from those of a success and of a failed test.
const NOT_RUN: u8 = 77;

const VMM_SETTING: &str = "COFFERDAM_CLOUD_HYPERVISOR";

const HOW_TO_GET_IT: &str = "install your distribution's package, or name the static binary of a release \
                             (https://github.com/cloud-hypervisor/cloud-hypervisor/releases) in \
                             COFFERDAM_CLOUD_HYPERVISOR";

/// The factor by which time limits grow if the machine below the VMM is emulated, too.
const NESTED_PATIENCE: u32 = 5;

/// Enough for four guests at a time and the tests' files.
const NESTED_MEMORY_MIB: u32 = 8192;

/// This version starts machines on processors without XSAVE, unlike v49.
const WITHOUT_XSAVE: u32 = 53;

/// Run the whole-system tests with cloud-hypervisor; where KVM does not work, inside an emulated machine.
///
/// A machine that hangs is replaced, and the new one runs the remaining tests. A test is tried up to three times if it fails,
/// or if its machine hangs or dies. The summary lists these tests.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Time limit for the whole run, without compiling
    #[arg(long, default_value = "8h", value_parser = humantime::parse_duration)]
    time_limit: Duration,
    /// A machine counts as hung if no test begins or ends for this long
    #[arg(long, default_value = "10m", value_parser = humantime::parse_duration)]
    stall_limit: Duration,
    /// Run this test once, on this machine [default: compile all tests and run them in supervised machines]
    #[arg(long = "test", value_name = "FILE=NAME")]
    tests: Vec<Test>,
    /// Measure a trivial build instead, or the benchmark's parts that are named
    #[arg(long)]
    bench: bool,
    /// Only tests whose names, as in `deaths::the_vmm_is_killed`, contain one of these
    filters: Vec<String>,
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.tests.is_empty() {
        return prepare(&arguments).await;
    }
    inside::run(&arguments.tests).await?;
    Ok(ExitCode::SUCCESS)
}

/// Prepares everything for the tests, and runs them where KVM works.
async fn prepare(arguments: &Arguments) -> Result<ExitCode> {
    let survey = vmm::survey();
    let Some(found) = survey.cloud_hypervisor.found else {
        let what = survey.cloud_hypervisor.missing.first().map_or("it is missing", |missing| &missing.what);
        eprintln!("the tests with cloud-hypervisor did not run: {what}; {HOW_TO_GET_IT}");
        // If the variable names one, it was meant to be tested.
        return Ok(ExitCode::from(if env::var_os(VMM_SETTING).is_some() { 1 } else { NOT_RUN }));
    };
    println!("cloud-hypervisor {} ({})", found.version, found.program.display());
    // Compiling below may replace the file. Then only its name finds it.
    let this = env::current_exe()?;
    // They are found in the cache.
    guest::compile_all();
    let place = match survey.kvm {
        Ok(_) => Place::Here,
        Err(error) => {
            println!("{error}; so the tests run inside an emulated machine, whose KVM works");
            let major = found.version.split('.').next().and_then(|major| major.parse().ok());
            let xsave = major.is_none_or(|major: u32| major < WITHOUT_XSAVE);
            Place::Outer(Outer { memory_mib: NESTED_MEMORY_MIB, xsave })
        }
    };
    let mut command = environment(&found.program, &place);
    let passed = if arguments.bench {
        command.push(this.with_file_name("bench").into());
        command.extend(arguments.filters.iter().map(OsString::from));
        bench(&place, &command, arguments.time_limit).await?
    } else {
        command.push(this.into());
        let vmm = format!("cloud-hypervisor {}", found.version);
        run_tests(arguments, place, command, &vmm).await?
    };
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A command line that sets these variables.
fn environment(vmm: &Path, place: &Place) -> Vec<OsString> {
    let factor = if matches!(place, Place::Here) { 1 } else { NESTED_PATIENCE };
    let mut command = vec![OsString::from("env")];
    for (key, value) in [
        ("COFFERDAM_BIN", program().as_os_str()),
        ("COFFERDAM_TEST_IMAGE", image().0.as_os_str()),
        (DEBIAN_IMAGE_SETTING, debian_image().0.as_os_str()),
        (VMM_SETTING, vmm.as_os_str()),
        (cofferdam_tests::vmm::SETTING, "cloud-hypervisor".as_ref()),
        (patience::SETTING, factor.to_string().as_ref()),
    ] {
        let mut assignment = OsString::from(format!("{key}="));
        assignment.push(value);
        command.push(assignment);
    }
    command
}

/// Whether the benchmark succeeds.
async fn bench(place: &Place, command: &[OsString], time_limit: Duration) -> Result<bool> {
    let Place::Outer(outer) = place else {
        return Ok(Command::new(&command[0]).args(&command[1..]).status().await?.success());
    };
    let overdue = async {
        sleep(time_limit).await;
        format!("the benchmark did not end within {}", humantime::format_duration(time_limit))
    };
    Ok(outer.run(command, io::stdout(), overdue).await? == 0)
}

/// Whether all tests pass.
async fn run_tests(arguments: &Arguments, place: Place, command: Vec<OsString>, vmm: &str) -> Result<bool> {
    let mut tests = list(test_executable().map_err(Error::msg)?).await?;
    let wanted = |name: &str| arguments.filters.is_empty() || arguments.filters.iter().any(|part| name.contains(part));
    tests.retain(|test| wanted(&test.name));
    ensure!(!tests.is_empty(), "no test has such a name");
    let (stall_limit, time_limit) = (arguments.stall_limit, arguments.time_limit);
    let supervisor = Supervisor { place, command, tests: &tests, stall_limit, time_limit };
    let mut plan = Plan::new(tests.iter().map(|test| test.name.clone()));
    let begun = Instant::now();
    supervisor.run(&mut plan).await?;
    println!("{}", plan.summary(vmm, begun.elapsed().as_secs()));
    Ok(plan.passed())
}

/// The tests of an executable; none is ignored in this project.
async fn list(executable: PathBuf) -> Result<Vec<Test>> {
    let mut command = Command::new(&executable);
    command.args(["--list", "--format", "terse"]).stderr(Stdio::inherit());
    let listed = command.output().await.context("a test executable can't be started")?;
    ensure!(listed.status.success(), "{} can't list its tests", executable.display());
    let listed = String::from_utf8_lossy(&listed.stdout);
    let names = listed.lines().filter_map(|line| line.strip_suffix(": test"));
    Ok(names.map(|name| Test { executable: executable.clone(), name: name.to_owned() }).collect())
}
