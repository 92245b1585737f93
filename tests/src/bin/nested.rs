//! `nested`: runs a command in the outer machine, whose KVM works even where this host's does not.

use std::{ffi::OsString, io, process::ExitCode, time::Duration};

use anyhow::Result;
use clap::Parser;
use cofferdam_tests::nested::Outer;
use tokio::time::sleep;

/// Run a command where KVM works: in an emulated machine that sees this host's files. Files that it writes are lost.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Memory of the machine in MiB, which also has to hold the files that the command writes
    #[arg(long, default_value_t = 4096)]
    memory_mib: u32,
    /// Time limit for the command
    #[arg(long, default_value = "1h", value_parser = humantime::parse_duration)]
    time_limit: Duration,
    /// Give the processor XSAVE, which older cloud-hypervisors (v49) need
    #[arg(long)]
    xsave: bool,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let Arguments { memory_mib, time_limit, xsave, command } = Arguments::parse();
    let overdue = async {
        sleep(time_limit).await;
        format!("the command did not end within {}", humantime::format_duration(time_limit))
    };
    let code = Outer { memory_mib, xsave }.run(&command, io::stdout(), overdue).await?;
    Ok(ExitCode::from(u8::try_from(code)?))
}
