//! Fuzzes every decoder for a while: `cofferdam-fuzz [SECONDS] [TARGET…]`. The default is a minute for each target, one
//! target a processor at a time.
//!
//! ```text
//!   cofferdam-fuzz ─▶ cargo build ─▶ cofferdam-fuzz as rustc's wrapper ─▶ rustc, with LLVM's coverage counters
//!        └──────────▶ each target's program (libFuzzer), from its seeds, its corpus and what earlier runs have found;
//!                     the best new inputs go into its corpus
//! ```
//!
//! cargo-fuzz does the same, but needs a nightly toolchain. This program works with any: the counters are a pass of LLVM that
//! rustc can run, and the crate `libfuzzer-sys` compiles libFuzzer. Only the crates of this workspace get counters, so the
//! dependencies that were compiled for the tests can be used again.

mod merge;

use std::{
    env,
    ffi::OsString,
    fs,
    num::{NonZeroU32, NonZeroU64},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
};

use anyhow::{Context as _, Result, bail, ensure};
use cofferdam_fuzz::{TARGETS, Target};

const DEFAULT_SECONDS: NonZeroU32 = NonZeroU32::new(60).expect("not zero");

/// Set where this program runs as rustc's wrapper.
const WRAP: &str = "COFFERDAM_FUZZ_WRAP";

/// Limits for one input. Exceeding one is a finding.
const LIMITS: [&str; 3] = ["-rss_limit_mb=1024", "-timeout=120", "-max_len=16384"];

fn main() -> Result<()> {
    let mut args: Vec<_> = env::args_os().skip(1).collect();
    if env::var_os(WRAP).is_some() {
        return Err(wrap_rustc(&args).into());
    }
    let seconds = args.first().and_then(|arg| arg.to_str()?.parse().ok());
    if seconds.is_some() {
        args.remove(0);
    }
    let targets = args.iter().map(|name| {
        let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        let target = TARGETS.iter().find(|target| name == target.name).copied();
        target.with_context(|| format!("{name:?} is no target; there are {}", names.join(", ")))
    });
    let mut targets = targets.collect::<Result<Vec<_>>>()?;
    if targets.is_empty() {
        targets = TARGETS.to_vec();
    }
    let programs = build(&targets)?;
    println!("{:<14} {:>11} {:>10} {:>13} {:>10}", "target", "runs", "a second", "coverage", "new files");
    let (targets, workers) = (Mutex::new(targets.into_iter()), thread::available_parallelism()?.get());
    let work = || {
        while let Some(target) = next(&targets) {
            fuzz(&programs, &target, seconds.unwrap_or(DEFAULT_SECONDS))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("targets panic in processes of their own"))
    })
}

fn next(targets: &Mutex<impl Iterator<Item = Target>>) -> Option<Target> {
    targets.lock().unwrap_or_else(PoisonError::into_inner).next()
}

/// Becomes rustc, and returns only if rustc can't be started.
fn wrap_rustc(args: &[OsString]) -> std::io::Error {
    let (rustc, args) = args.split_first().expect("cargo names rustc");
    let mut command = Command::new(rustc);
    command.args(args);
    let runs_while_building = args
        .windows(2)
        .any(|pair| pair[0] == "--crate-name" && pair[1].to_str().is_some_and(|name| name.starts_with("build_script")));
    if !runs_while_building {
        command.args(["-Copt-level=2", "-Cpasses=sancov-module"]);
        let counters = ["level=4", "inline-8bit-counters", "pc-table", "trace-compares"];
        command.args(counters.map(|counter| format!("-Cllvm-args=-sanitizer-coverage-{counter}")));
    }
    command.exec()
}

/// Compiles the targets' programs with counters, and returns their folder.
fn build(targets: &[Target]) -> Result<PathBuf> {
    let this = env::current_exe()?;
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--package", env!("CARGO_PKG_NAME")]);
    cargo.args(targets.iter().flat_map(|target| ["--bin", target.name]));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    // ring's build script runs again when they change, and they are set only if cargo has started this program.
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            cargo.env_remove(name);
        }
    }
    cargo.env("RUSTC_WORKSPACE_WRAPPER", &this).env(WRAP, "1").env("CARGO_INCREMENTAL", "0");
    ensure!(cargo.status()?.success(), "the targets can't be compiled");
    Ok(this.with_file_name(""))
}

fn fuzz(programs: &Path, target: &Target, seconds: NonZeroU32) -> Result<()> {
    let (program, corpus) = (programs.join(target.name), target.corpus());
    let place = programs.join("fuzz").join(target.name);
    let (found, log_path) = (place.join("corpus"), place.join("log"));
    let artifacts = PathBuf::from_iter([env!("CARGO_MANIFEST_DIR"), "artifacts", target.name, ""]);
    for folder in [&found, &corpus, &artifacts] {
        fs::create_dir_all(folder)?;
    }
    for (at, seed) in (target.seeds)().iter().enumerate() {
        fs::write(corpus.join(format!("seed-{at}")), seed)?;
    }
    let mut fuzzer = Command::new(&program);
    fuzzer.args(LIMITS).arg(format!("-max_total_time={seconds}"));
    fuzzer.arg(format!("-artifact_prefix={}/", artifacts.display())).args([&found, &corpus]);
    let log = run(fuzzer, &log_path).with_context(|| {
        format!(
            "{} has a finding in {}; once it is fixed, move it to {}",
            target.name,
            artifacts.display(),
            corpus.display()
        )
    })?;
    let (begin, end) = (coverage(&log, "INITED"), coverage(&log, "DONE"));
    let runs = log.lines().find_map(|line| line.strip_prefix("Done ")?.split(' ').next()?.parse::<u64>().ok());
    let (Some(begin), Some(end), Some(runs)) = (begin, end, runs) else {
        bail!("{} ran without counters: see {}", target.name, log_path.display())
    };
    let new = merge::merge(&program, &corpus, &found, &place.join("merge"))
        .with_context(|| format!("{}'s corpus can't be merged", target.name))?;
    let a_second = runs / NonZeroU64::from(seconds);
    println!("{:<14} {runs:>11} {a_second:>10} {:>13} {new:>10}", target.name, format!("{begin} → {end}"));
    Ok(())
}

/// Runs libFuzzer and returns its log. After a failure it also prints the end of the log to stderr.
fn run(mut command: Command, log_path: &Path) -> Result<String> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(log_path)?);
    let status = command.status().with_context(|| format!("can't start {}", command.get_program().display()))?;
    // A target may print bytes that are no text.
    let log = String::from_utf8_lossy(&fs::read(log_path)?).into_owned();
    if !status.success() {
        let lines: Vec<_> = log.lines().collect();
        eprintln!("{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        bail!("see {} for the whole log", log_path.display());
    }
    Ok(log)
}

/// The number of places that the corpus reaches, from libFuzzer's line for this event. Not zero.
fn coverage(log: &str, event: &str) -> Option<u64> {
    let line = log.lines().rfind(|line| line.starts_with('#') && line.contains(event))?;
    let count = line.split_once("cov: ")?.1.split(' ').next()?.parse().ok()?;
    (count > 0).then_some(count)
}
