//! Derivations of Nix whose outputs are addressed by their contents, and what needs them.

use cofferdam_tests::{
    Cofferdam, Daemon,
    nix::{Nix, Release},
};

/// An output that refers to itself, two of which one refers to the other, the bytes of a file, and a derivation that is addressed
/// by its inputs and needs the others.
const EXPRESSION: &str = r#"
    let
      common = { system = "x86_64-linux"; builder = "/bin/sh"; };
      floating = { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
      make = name: script: derivation (common // floating // { inherit name; args = [ "-c" script ]; });
    in rec {
      first = make "first" "echo first > $out";
      second = make "second" "read word < ${first}; echo $word ${first} $out $out > $out";
      two = derivation (common // floating // {
        name = "two";
        outputs = [ "out" "dev" ];
        args = [ "-c" "echo $dev $out > $out; echo ${first} $dev > $dev" ];
      });
      flat = derivation (common // floating // {
        name = "flat";
        outputHashMode = "flat";
        args = [ "-c" "echo flat > $out" ];
      });
      plain = derivation (common // { name = "plain"; args = [ "-c" "echo ${second} ${two.dev} > $out" ]; });
      # Another derivation with the same output as the first one, and one that needs it.
      again = make "first" "echo told again >&2; echo first > $out";
      cut = make "second" "read word < ${again}; echo $word ${again} $out $out > $out";
      cycle = derivation (common // floating // {
        name = "cycle";
        outputs = [ "out" "dev" ];
        args = [ "-c" "echo $dev > $out; echo $out > $dev" ];
      });
    }
"#;

const WANTED: [&str; 4] = ["second", "two", "flat", "plain"];

/// The paths that Nix of this release gives these outputs when it builds them itself. Nix 2.8 hashes what refers to itself in
/// another way.
fn built_by(release: Release) -> [&'static str; 4] {
    match release {
        Release::Bookworm => [
            "/nix/store/b5f27phjjpdkmdxfxc1siiv1ipkhg6pc-second",
            "/nix/store/v1pvi4n3644b4qzis02safh43igbn52j-two",
            "/nix/store/ca1y6c916z1ck1dxi4rcrsfs9rzp728w-flat",
            "/nix/store/lb8xavp225z75w9sb60xznyifp6xspr0-plain",
        ],
        Release::Trixie | Release::Forky => [
            "/nix/store/cs47jxh541x1vh95nxszlxkzcxrdlffl-second",
            "/nix/store/43fv9znhdjvy1sndw33g1vb60wph9qay-two",
            "/nix/store/ca1y6c916z1ck1dxi4rcrsfs9rzp728w-flat",
            "/nix/store/db4i1ijkgsnwgvzgyq87f2xmkm868ha0-plain",
        ],
    }
}

fn arguments<'a>(attributes: &[&'a str]) -> Vec<&'a str> {
    let attributes = attributes.iter().flat_map(|attribute| ["-A", attribute]);
    ["--no-out-link", "-E", EXPRESSION].into_iter().chain(attributes).collect()
}

#[test]
fn floating_outputs_are_those_that_nix_builds_itself() {
    let cofferdam = Cofferdam::new();
    let uid = nix::unistd::getuid();
    // Equal requests of several clients are built once, so few machines are started.
    let daemon = Daemon::start(&cofferdam, &format!("reuse = 'shared'\n[nix]\nspeakers = [{uid}]"));
    for release in [Release::Forky, Release::Trixie, Release::Bookworm] {
        let nix = Nix::content_addressing(&cofferdam, &daemon, release);
        let local = nix.store("local");
        let local = local.to_str().unwrap();
        let build = |store: &[&str], attributes: &[&str]| {
            let built = nix.run("nix-build", [&arguments(attributes)[..], store].concat()).succeeds();
            let paths: Vec<_> = built.stdout.lines().map(str::to_owned).collect();
            (paths, built.stderr)
        };
        let builder = nix.builder_for(&format!("{release:?}-remote"));
        let builders = format!("{builder} x86_64-linux - 1 1 ca-derivations");
        let remote = ["--store", local, "--max-jobs", "0", "--builders", &builders];
        assert_eq!(build(&remote, &WANTED).0, built_by(release), "{release:?}");
        nix.run("nix-store", [&["--store", local, "--verify-path"], &built_by(release)[..]].concat()).succeeds();
        let second = std::fs::read_to_string(format!("{local}{}", built_by(release)[0])).unwrap();
        let itself = built_by(release)[0];
        let first = "/nix/store/6ji1386f0ml97vmacwncp5kdyvzplsfh-first";
        assert_eq!(second, format!("first {first} {itself} {itself}\n"));

        // The same in the daemon's store, and once more. What is another derivation with the same inputs is not built again.
        let store = nix.builder_for(&format!("{release:?}-store"));
        let there = ["--store", &store];
        assert_eq!(build(&there, &WANTED).0, built_by(release), "{release:?}");
        let (paths, log) = build(&there, &WANTED);
        assert_eq!(paths, built_by(release), "{release:?}");
        assert!(!log.contains("building"), "{log}");
        let (paths, log) = build(&there, &["cut"]);
        assert_eq!(paths, &built_by(release)[..1], "{release:?}");
        assert!(log.contains("told again") || !matches!(release, Release::Forky), "{log}");
        let query = nix.run("nix-store", ["--store", &store, "--query", "--references", itself]).succeeds();
        assert_eq!(query.stdout.lines().collect::<Vec<_>>(), [first, itself]);

        let cycle = nix.run("nix-build", [&arguments(&["cycle"])[..], &there].concat()).exits_with(1);
        assert!(cycle.stderr.contains("cycle detected in build of '/nix/store/"), "{cycle}");
    }
    daemon.end().succeeds();
}
