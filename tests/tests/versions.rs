//! What earlier versions have written is read by this one.

use std::{fs, path::Path, process::Command};

use cofferdam_tests::{Cofferdam, Daemon};
use nix::unistd::getuid;

/// A state directory that a version has left: a source, imported and named; a build by a client with user id 0; its output, log
/// and grants.
struct State {
    archive: &'static str,
    source: &'static str,
    output: &'static str,
    build: &'static str,
}

/// The first one is older than samples, paths of outputs and requests in records.
const STATES: [State; 2] = [
    State {
        archive: "state-0.1.0.tar.gz",
        source: "dir:blake3-zKyYbaVLH96/jb2LWN6QPB24tkvF3fIdUhV+RXa1Vv4=:4",
        output: "dir:blake3-SepjiscPg/qGAGUs6hbLyZtSf7M2Auov1UYC1jSwiDc=:4",
        build: "01a22230-4219-77e5-8e95-20e0bb5b9fef",
    },
    State {
        archive: "state-0.1.0-samples.tar.gz",
        source: "dir:blake3-zKyYbaVLH96/jb2LWN6QPB24tkvF3fIdUhV+RXa1Vv4=:4",
        output: "dir:blake3-sg18AF42sRTSgRRysGx64wcedArQpcHD1RNX2nzYn8c=:4",
        build: "01a22369-b4d0-71b7-9a55-92daf0dc2c57",
    },
];

impl State {
    fn unpack(&self) -> Cofferdam {
        let cofferdam = Cofferdam::new();
        let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join(self.archive);
        let mut unpack = Command::new("tar");
        unpack.arg("-xzf").arg(archive).arg("--no-same-owner").arg("-C").arg(cofferdam.state_directory());
        unpack.arg("--strip-components=1");
        fs::create_dir_all(cofferdam.state_directory()).expect("the test's directory can be written");
        assert!(unpack.status().expect("there is tar").success());
        cofferdam
    }
}

#[test]
fn stores_of_earlier_versions_are_read() {
    for state in &STATES {
        let cofferdam = state.unpack();
        cofferdam.command(["store", "verify"]).succeeds();
        let roots = cofferdam.command(["store", "root", "list"]).succeeds().stdout;
        assert_eq!(roots, format!("{}\tkept\n", state.source));
        let source = cofferdam.export(state.source);
        assert_eq!(fs::read_to_string(source.join("file")).unwrap(), "an input\n");
        assert_eq!(fs::read_link(source.join("link")).unwrap(), Path::new("file"));
        let output = cofferdam.export(state.output);
        assert_eq!(fs::read_to_string(output.join("data")).unwrap(), "data\n");
    }
}

#[test]
fn records_logs_and_grants_of_earlier_versions_are_read() {
    // The record gets older with every day.
    let config = "[store]\nisolation = \"tenants\"\n[records]\nmax_age = \"100years\"\n[operators]\n";
    for state in &STATES {
        let cofferdam = state.unpack();
        let daemon = Daemon::start(&cofferdam, &format!("{config}users = [{:?}]\n", getuid().to_string()));
        let addr = daemon.addr();
        let on_daemon = |arguments: &[&str]| {
            let arguments = arguments.iter().copied().chain(["--daemon", &addr]);
            cofferdam.command(arguments).succeeds()
        };
        let list = on_daemon(&["builds", "list", "--json"]).json();
        assert_eq!((list["id"].as_str(), list["state"].as_str()), (Some(state.build), Some("succeeded")), "{list}");
        let record = on_daemon(&["builds", "show", "--json", state.build]).json();
        assert_eq!(record["outputs"][0], state.output, "{record}");
        assert_eq!(on_daemon(&["builds", "log", state.build]).stdout, "hello from a log\n");
        let usage = on_daemon(&["usage", "--json"]).json();
        assert!(usage.to_string().contains("user:0"), "{usage}");
        daemon.end().succeeds();
    }
}
