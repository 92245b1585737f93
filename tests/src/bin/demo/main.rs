//! Compiles Lua inside a microVM, then lets a build fetch a package. It prints each command before it runs it.
//!
//! ```text
//!   gcc, make, … ── Debian's packages, unpacked ──┐
//!   Lua's sources ── Debian's source package ─────┼─▶ import ─▶ build in the VM ─▶ export ─▶ run here
//!                                                 │                 ║
//!                                                 └────────────────▶ build again: the same digest
//! ```

mod fetch;

use std::{
    env, fs,
    io::{IsTerminal, stderr},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use cofferdam_images::{cache_dir, debian::Debian};
use cofferdam_tests::{image, program};

/// The packages for compiling C. Their dependencies come along.
const TOOLCHAIN: [&str; 6] = ["binutils", "coreutils", "dash", "gcc", "libc6-dev", "make"];

/// The directories of a toolchain that a build sees at its root.
const ROOT_DIRECTORIES: [&str; 4] = ["bin", "lib", "lib64", "usr"];

/// Lua's own Makefile does the work; a static binary runs wherever the demo does.
const SCRIPT: &str = "cp -r --no-preserve=mode /lua/. . && make -j2 -C src posix MYLDFLAGS=-static";

/// The sum of the primes below 100,000 is 454,396,537.
const PROGRAM: &str = "local sum, sieve = 0, {}
for n = 2, 99999 do
  if not sieve[n] then sum = sum + n; for m = n * n, 99999, n do sieve[m] = true end end
end
print(_VERSION .. ' says that the primes below 100,000 add up to ' .. sum)";
const ANSWER: &str = "add up to 454396537";

fn main() -> Result<()> {
    let start = Instant::now();
    let directory = tempfile::tempdir().context("can't make a temporary directory")?;
    let cofferdam = Cofferdam { program: program(), state: directory.path().join("state") };
    say("The guest image: kernel, initramfs, scratch template");
    println!("  {}", image().0.display());

    say("A toolchain and Lua's sources from Debian's packages, unpacked and not installed");
    let root = directory.path().join("root");
    let packages = unpack(&root)?;
    println!("  {packages} packages");

    say("Import: every file and directory gets the name of its contents");
    let paths: Vec<_> = ROOT_DIRECTORIES.iter().chain(&["lua"]).map(|name| root.join(name)).collect();
    let mut import = vec!["import".to_owned()];
    import.extend(paths.iter().map(|path| path.display().to_string()));
    let (printed, took) = cofferdam.run(&import)?;
    print!("{printed}");
    println!("  took {}", seconds(took));

    let mut inputs = Vec::new();
    for line in printed.lines() {
        let (node, path) = line.split_once('\t').context("import prints node and path")?;
        let name = path.rsplit('/').next().unwrap_or(path);
        inputs.extend(["--input".to_owned(), format!("{name}={node}")]);
    }
    let out = directory.path().join("out");
    say("Build: Lua's Makefile in a machine of its own, which has these inputs, no network and nothing else");
    let first = cofferdam.build(&inputs, &["--out".to_owned(), out.display().to_string()])?;
    say("The same request once more");
    let second = cofferdam.build(&inputs, &[])?;
    ensure!(first == second, "the two builds differ: {first} and {second}");
    println!("  the same digest: {}", first.trim_end());

    say("What came out, run on this host");
    let answer = Command::new(out.join("build/src/lua")).args(["-e", PROGRAM]).output().context("can't run lua")?;
    let answer = String::from_utf8_lossy(&answer.stdout);
    print!("  {answer}");
    ensure!(answer.contains(ANSWER), "Lua computed something else");

    fetch::act(&cofferdam, directory.path())?;
    println!("\nDone in {}.", seconds(start.elapsed()));
    Ok(())
}

/// Makes the build's root below `root`, and returns the number of packages in it.
fn unpack(root: &Path) -> Result<usize> {
    let debian = Debian::open(&cache_dir(), false, |line| eprintln!("  {line}"))?;
    let packages = debian.closure(&TOOLCHAIN)?;
    for package in &packages {
        Debian::unpack(package, root)?;
    }
    let sources = root.join("lua");
    fs::create_dir(&sources).context("can't make a directory for Lua's sources")?;
    let unpacked = Command::new("tar")
        .args(["--extract", "--strip-components=1", "--file"])
        .arg(debian.source("lua5.4")?)
        .arg("--directory")
        .arg(&sources)
        .status()
        .context("can't start tar")?;
    ensure!(unpacked.success(), "tar can't unpack Lua's sources ({unpacked})");
    Ok(packages.len())
}

struct Cofferdam {
    program: &'static Path,
    state: PathBuf,
}

impl Cofferdam {
    /// Builds Lua, and returns the printed line about its output.
    fn build(&self, inputs: &[String], more: &[String]) -> Result<String> {
        let build = ["run", "--inputs-dir", "", "--env", "PATH=/usr/bin:/bin", "--output", "build/src/lua"];
        let mut arguments: Vec<_> = build.map(str::to_owned).into();
        arguments.extend_from_slice(inputs);
        arguments.extend_from_slice(more);
        arguments.extend(["--", "/bin/sh", "-c", SCRIPT].map(str::to_owned));
        let (printed, took) = self.run(&arguments)?;
        print!("{printed}");
        println!("  took {}", seconds(took));
        Ok(printed)
    }

    /// Shows and runs one command, and returns its stdout and its time.
    fn run(&self, arguments: &[String]) -> Result<(String, Duration)> {
        let (output, took) = self.start(arguments)?;
        ensure!(output.status.success(), "cofferdam failed ({})", output.status);
        Ok((String::from_utf8(output.stdout).context("cofferdam prints UTF-8")?, took))
    }

    /// Shows and runs one command, whose build has to fail.
    fn fails(&self, arguments: &[String]) -> Result<()> {
        let (output, took) = self.start(arguments)?;
        ensure!(output.status.code() == Some(1), "the build did not fail ({})", output.status);
        println!("  failed as it should; took {}", seconds(took));
        Ok(())
    }

    fn start(&self, arguments: &[String]) -> Result<(Output, Duration)> {
        println!("  $ cofferdam {}", arguments.iter().map(|argument| quoted(argument)).collect::<Vec<_>>().join(" "));
        let mut command = Command::new(self.program);
        command.args(arguments).env("COFFERDAM_STATE_DIR", &self.state).stderr(Stdio::inherit());
        // On a terminal the command itself prints a summary of its times.
        if !stderr().is_terminal() && env::var_os("COFFERDAM_LOG").is_none() {
            command.env("COFFERDAM_LOG", "cofferdam::cli=info");
        }
        let start = Instant::now();
        let output = command.output().context("can't start cofferdam")?;
        Ok((output, start.elapsed()))
    }
}

fn say(what: &str) {
    println!("\n{what}");
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

fn quoted(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=/:.,+".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        argument.to_owned()
    } else {
        format!("'{}'", argument.replace('\'', r"'\''"))
    }
}
