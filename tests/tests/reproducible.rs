//! Builds that run again and are compared with what they made before.

use cofferdam_tests::{Cofferdam, Daemon};
use serde_json::Value;

/// Makes a random number, and a file that is always the same.
const RANDOM: &str = "mkdir out; echo same > out/same; tr -dc 0-9 < /dev/urandom | head -c 20 > out/number";

#[test]
fn a_build_that_makes_other_outputs_fails_and_tells_which() {
    let cofferdam = Cofferdam::new();
    let differs = cofferdam.build().output("build/out").switch("--check").shell(RANDOM);
    let differs = differs.build_fails("not_reproducible").says("1 path differs");
    let json = differs.says("build/out/number: byte ").says(" before, dir:blake3-").json();
    let [difference] = &json["fields"]["differences"].as_array().unwrap()[..] else { panic!("{json}") };
    assert_eq!(difference["path"], "build/out/number");
    assert_eq!(difference["lines"].as_array().unwrap().len(), 2, "{json}");
}

#[test]
fn a_daemon_compares_with_what_it_has_built_before() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    let build = || cofferdam.build().on(&daemon).output("build/out");
    let made = "mkdir out; echo same > out/same";
    build().shell(made).succeeds();
    build().switch("--check").shell(made).succeeds().says("built before").says("building again");
    build().switch("--check").shell(RANDOM).build_fails("not_reproducible").says("build/out/number");
    let list = cofferdam.command(["builds", "--daemon", &daemon.addr(), "list", "--json"]).succeeds().stdout;
    let states: Vec<Value> =
        list.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["state"].clone()).collect();
    assert_eq!(states, ["failed", "succeeded", "succeeded", "succeeded"]);
    daemon.end().succeeds();
}
