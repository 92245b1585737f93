//! Runs test suites of others, CPython's and libuv's, in a plain chroot of this host and in a build, with the same root and the same
//! unprivileged user, and lists the tests that differ. `docs/differences.md` explains each; one that it doesn't have is a failure.
//!
//! Arguments: `--all` for every test of CPython instead of those that ask most of the system; `python` or `libuv` for one suite.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use cofferdam_images::{cache_dir, debian::Debian};
use cofferdam_tests::{Cofferdam, debian_root, recipes};
use nix::unistd::geteuid;

const DIFFERENCES: &str = include_str!("../../../docs/differences.md");

const PACKAGES: [&str; 19] = [
    "base-files",
    "bash",
    "cmake",
    "coreutils",
    "dash",
    "diffutils",
    "findutils",
    "gawk",
    "gcc",
    "grep",
    "hostname",
    "libc6-dev",
    "libpython3.11-testsuite",
    "make",
    "netbase",
    "procps",
    "python3",
    "sed",
    "util-linux",
];

/// libuv's source package, from the archive that always has its tarball.
const LIBUV: &str = "libuv1/bookworm";

/// The user in both places.
const ACCOUNTS: [(&str, &str); 3] = [
    (
        "passwd",
        "root:x:0:0:root:/root:/bin/sh\nnixbld:x:1000:100::/build:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    ),
    ("group", "root:x:0:\nnixbld:x:100:\nnogroup:x:65534:\n"),
    ("hosts", "127.0.0.1 localhost\n::1 localhost\n"),
];

/// The tests of CPython that ask most of the system: files, processes, signals, sockets, terminals, clocks and limits.
const PYTHON_TESTS: &str = "test_epoll test_fcntl test_fork1 test_glob test_grp test_ioctl test_mmap test_openpty test_os \
    test_pathlib test_poll test_posix test_posixpath test_pty test_pwd test_resource test_select test_selectors \
    test_shutil test_signal test_socket test_stat test_tempfile test_threadsignals test_time test_wait3 test_wait4 \
    test_zipfile";

/// Both suites write their results below the working directory.
const PYTHON_SCRIPT: &str =
    "python3 -m test --junit-xml results.xml --timeout 600 $TESTS > python.log 2>&1 < /dev/null || true
    test -s results.xml";
const LIBUV_SCRIPT: &str = "/libuv/uv_run_tests > results.tap 2> libuv.log < /dev/null || true
    test -s results.tap";

/// A test that takes too long where the processor is emulated says nothing about the system.
const ENVIRONMENT: [(&str, &str); 4] =
    [("HOME", "/build"), ("PATH", "/usr/bin:/bin"), ("LC_ALL", "C.UTF-8"), ("UV_TEST_TIMEOUT_MULTIPLIER", "20")];

/// How a test ended: "ok", "failed" or "skipped", by the test's name.
type Results = BTreeMap<String, &'static str>;

struct Suite {
    name: &'static str,
    script: &'static str,
    results: &'static str,
    read: fn(&str) -> Results,
}

const SUITES: [Suite; 2] = [
    Suite { name: "python", script: PYTHON_SCRIPT, results: "results.xml", read: read_junit },
    Suite { name: "libuv", script: LIBUV_SCRIPT, results: "results.tap", read: read_tap },
];

fn main() -> Result<()> {
    let asked: Vec<String> = env::args().skip(1).collect();
    let all = asked.iter().any(|argument| argument == "--all");
    let names: Vec<_> = asked.iter().filter(|argument| *argument != "--all").collect();
    if let Some(unknown) = names.iter().find(|name| SUITES.iter().all(|suite| suite.name != ***name)) {
        bail!("there is no suite {unknown:?}; there are python and libuv, and the flag --all");
    }
    ensure!(geteuid().is_root(), "a chroot needs root");
    let root = root()?;
    let tests = if all { "" } else { PYTHON_TESTS };
    let mut unexplained = 0;
    for suite in SUITES.iter().filter(|suite| names.is_empty() || names.iter().any(|name| *name == suite.name)) {
        let begun = Instant::now();
        let here = in_chroot(&root, suite, tests)?;
        println!("{}: {} tests in a chroot, in {:.0} s", suite.name, here.len(), begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        let there = in_build(&root, suite, tests)?;
        println!("{}: {} tests in a build, in {:.0} s", suite.name, there.len(), begun.elapsed().as_secs_f64());
        ensure!(here.values().any(|how| *how == "ok"), "no test of {} passes in the chroot", suite.name);
        unexplained += compare(suite.name, &here, &there);
    }
    ensure!(unexplained == 0, "docs/differences.md explains all but {unexplained} of them");
    Ok(())
}

/// Prints the tests that differ, and returns the number of those that the document doesn't have.
fn compare(suite: &str, here: &Results, there: &Results) -> usize {
    let absent = "absent";
    let names: BTreeSet<_> = here.keys().chain(there.keys()).collect();
    let mut unexplained = 0;
    for name in names {
        let (here, there) = (here.get(name).unwrap_or(&absent), there.get(name).unwrap_or(&absent));
        if here != there {
            let is_explained = DIFFERENCES.contains(&format!("`{name}`"));
            unexplained += usize::from(!is_explained);
            println!(
                "{suite}\t{name}\tchroot: {here}\tbuild: {there}{}",
                if is_explained { "" } else { "\tnot explained" }
            );
        }
    }
    unexplained
}

/// The root of both, made once.
fn root() -> Result<PathBuf> {
    let debian = Debian::open(&cache_dir(), false, |line| eprintln!("  {line}"))?;
    let packages = debian.closure(&PACKAGES)?;
    let identity = format!("{} {ACCOUNTS:?} {LIBUV}", debian_root::identity(&packages));
    let made = recipes::cache(&identity, |staging| {
        let root = staging.join("root");
        debian_root::unpack(&packages, &root)?;
        for (name, text) in ACCOUNTS {
            fs::write(root.join("etc").join(name), text)?;
        }
        for name in ["build", "libuv"] {
            fs::create_dir(root.join(name))?;
        }
        debian_root::unpack_source(&debian.source(LIBUV)?, &root.join("libuv"))?;
        let build = "cd /libuv && cmake -DCMAKE_BUILD_TYPE=Debug . && make -j2 uv_run_tests";
        done(Command::new("chroot").arg(&root).args(["/bin/sh", "-c", build]))
    })?;
    Ok(made.join("root"))
}

/// Runs a suite in a chroot that has this host's devices, processes and network.
fn in_chroot(root: &Path, suite: &Suite, tests: &str) -> Result<Results> {
    let directory = tempfile::tempdir()?;
    nix::unistd::chown(directory.path(), Some(1000.into()), Some(100.into()))?;
    let enter = "mount --make-rprivate / && mount --rbind /dev \"$1/dev\" && mount --rbind /sys \"$1/sys\" &&
        mount -t proc proc \"$1/proc\" && mount -t tmpfs tmpfs \"$1/tmp\" && mount --bind \"$2\" \"$1/build\" &&
        exec /usr/sbin/chroot --userspec=1000:100 --groups=100 \"$1\" /bin/sh -c \"cd /build; $3\"";
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--pid", "--fork", "sh", "-ec", enter, "sh"])
        .arg(root)
        .arg(directory.path())
        .arg(suite.script);
    command.env_clear().envs(ENVIRONMENT).env("TESTS", tests);
    done(&mut command)?;
    Ok((suite.read)(&fs::read_to_string(directory.path().join(suite.results))?))
}

fn in_build(root: &Path, suite: &Suite, tests: &str) -> Result<Results> {
    let cofferdam = Cofferdam::new();
    let output = format!("build/{}", suite.results);
    let mut command = cofferdam.prepare();
    command.args(["run", "--memory", "2G", "--timeout", "6h", "--silence", "6h", "--out", "out", "--output", &output]);
    command.arg("--root").arg(root);
    for (key, value) in ENVIRONMENT.into_iter().chain([("TESTS", tests)]) {
        command.arg("--env").arg(format!("{key}={value}"));
    }
    done(command.args(["--", "/bin/sh", "-c", suite.script]))?;
    Ok((suite.read)(&fs::read_to_string(cofferdam.files().join("out").join(output))?))
}

fn done(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("can't start {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// Reads the results of CPython's own runner, which writes one element a test, with its failure or skip inside.
fn read_junit(xml: &str) -> Results {
    let attribute = |element: &str, name: &str| {
        let (_, rest) = element.split_once(&format!(" {name}=\""))?;
        Some(rest.split('"').next()?.to_owned())
    };
    let elements = xml.split("<testcase").skip(1);
    let result = |element: &str| {
        let name = attribute(element, "name")?;
        let is = |word: &str| element.contains(&format!("<{word}"));
        let how = match () {
            () if is("skipped") || attribute(element, "result").as_deref() == Some("skipped") => "skipped",
            () if is("failure") || is("error") => "failed",
            () => "ok",
        };
        Some((name, how))
    };
    elements.filter_map(result).collect()
}

/// Reads the results of libuv's runner: `ok 1 - name`, `not ok 2 - name`, `ok 3 - name # SKIP why`.
fn read_tap(tap: &str) -> Results {
    let result = |line: &str| {
        let (is_ok, rest) = match line.strip_prefix("not ") {
            Some(rest) => (false, rest),
            None => (true, line),
        };
        let (_, name) = rest.strip_prefix("ok ")?.split_once(" - ")?;
        let (name, is_skipped) = match name.split_once(" # SKIP") {
            Some((name, _)) => (name, true),
            None => (name, false),
        };
        Some((
            name.trim().to_owned(),
            if is_skipped {
                "skipped"
            } else if is_ok {
                "ok"
            } else {
                "failed"
            },
        ))
    };
    tap.lines().filter_map(result).collect()
}
