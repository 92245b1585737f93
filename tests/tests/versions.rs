//! What earlier versions have written is read by this one.

use std::{fs, path::Path, process::Command};

use cofferdam_tests::{Cofferdam, Daemon};
use nix::unistd::getuid;

/// The state directory that version 0.1.0 has left: a source, imported and named; a build by a client with user id 0; its output,
/// log and grants.
const STATE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/state-0.1.0.tar.gz");

const SOURCE: &str = "dir:blake3-zKyYbaVLH96/jb2LWN6QPB24tkvF3fIdUhV+RXa1Vv4=:4";
const OUTPUT: &str = "dir:blake3-SepjiscPg/qGAGUs6hbLyZtSf7M2Auov1UYC1jSwiDc=:4";
const BUILD: &str = "01a22230-4219-77e5-8e95-20e0bb5b9fef";

fn with_state() -> Cofferdam {
    let cofferdam = Cofferdam::new();
    let mut unpack = Command::new("tar");
    unpack.arg("-xzf").arg(STATE).arg("--no-same-owner").arg("-C").arg(cofferdam.state_directory());
    unpack.arg("--strip-components=1");
    fs::create_dir_all(cofferdam.state_directory()).expect("the test's directory can be written");
    assert!(unpack.status().expect("there is tar").success());
    cofferdam
}

#[test]
fn a_store_of_version_0_1_is_read() {
    let cofferdam = with_state();
    cofferdam.command(["store", "verify"]).succeeds();
    assert_eq!(cofferdam.command(["store", "root", "list"]).succeeds().stdout, format!("{SOURCE}\tkept\n"));
    let source = cofferdam.export(SOURCE);
    assert_eq!(fs::read_to_string(source.join("file")).unwrap(), "an input\n");
    assert_eq!(fs::read_link(source.join("link")).unwrap(), Path::new("file"));
    let output = cofferdam.export(OUTPUT);
    assert_eq!(fs::read_to_string(output.join("data")).unwrap(), "data\n");
}

#[test]
fn records_logs_and_grants_of_version_0_1_are_read() {
    let cofferdam = with_state();
    // The record gets older with every day.
    let config = "[store]\nisolation = \"tenants\"\n[records]\nmax_age = \"100years\"\n[operators]\n";
    let daemon = Daemon::start(&cofferdam, &format!("{config}users = [{:?}]\n", getuid().to_string()));
    let addr = daemon.addr();
    let on_daemon = |arguments: &[&str]| {
        let arguments = arguments.iter().copied().chain(["--daemon", &addr]);
        cofferdam.command(arguments).succeeds()
    };
    let list = on_daemon(&["builds", "list", "--json"]).json();
    assert_eq!((list["id"].as_str(), list["state"].as_str()), (Some(BUILD), Some("succeeded")), "{list}");
    assert_eq!(on_daemon(&["builds", "log", BUILD]).stdout, "hello from a log\n");
    let usage = on_daemon(&["usage", "--json"]).json();
    assert!(usage.to_string().contains("user:0"), "{usage}");
    daemon.end().succeeds();
}
