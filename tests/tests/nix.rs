//! Plain Nix builds with a daemon.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    time::{Duration, Instant},
};

use cofferdam_tests::{
    Cofferdam, Daemon, Lab, Outcome,
    nix::{Nix, Release, with_make},
    program,
    ssh::Sshd,
    stretched,
};
use nix::sys::signal::Signal;

/// Two derivations of `make`, of which the second needs the first.
const CHAIN: &str = r#"
    let
      first = make "first" "echo told by the first >&2; echo first > $out";
    in make "second" "read word < ${first}; echo $word ${first} > $out"
"#;

/// A derivation whose contents are said to be another file's.
const WRONG_HASH: &str = r#"
    derivation {
      name = "fixed";
      system = "x86_64-linux";
      builder = "/bin/sh";
      args = [ "-c" "echo something else > $out" ];
      outputHashAlgo = "sha256";
      outputHash = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
    }
"#;

const FAILING: &str = r#"
    derivation {
      name = "failing";
      system = "x86_64-linux";
      builder = "/bin/sh";
      args = [ "-c" "echo its last words >&2; exit 3" ];
    }
"#;

#[test]
fn nix_builds_a_chain_and_finds_it_again() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "withhold_network = true");
    let nix = Nix::new(&cofferdam, &daemon, Release::Bookworm);
    let local = nix.store("local");
    let local = local.to_str().unwrap();

    let built = nix.build(CHAIN).succeeds();
    assert!(built.stderr.contains("told by the first"), "{built}");
    let second = built.stdout.trim().to_owned();
    let references = nix.run("nix-store", ["--store", local, "--query", "--references", &second]).succeeds();
    let first = references.stdout.trim().to_owned();
    assert!(first.ends_with("-first"), "{references}");
    let contents = fs::read_to_string(format!("{local}{second}")).unwrap();
    assert_eq!(contents, format!("first {first}\n"));
    nix.run("nix-store", ["--store", local, "--verify-path", &first, &second]).succeeds();

    let failed = nix.build(FAILING).exits_with(1);
    assert!(failed.stderr.contains("its last words"), "{failed}");
    assert!(failed.stderr.contains("the command exited with status 3"), "{failed}");

    let failed = nix.build(WRONG_HASH).exits_with(1);
    for hash in
        ["sha256-WJG1tSLV3whtD/CxEPvZ0hu0/HFjrzTQgoai6Eb2vgM=", "sha256-oWIb6VBAI57hQ2LBbiBRDdwg9SfXctgjsqFnmzP1zXQ="]
    {
        assert!(failed.stderr.contains(hash), "{failed}");
    }

    // By the protocol that NixOS and bare host names choose, with an input that is there.
    let more = CHAIN.replace("\"second\"", "\"third\"").replace("read word", "echo told by the third; read word");
    let built = nix.build_at(&nix.served_builder(), &more).succeeds();
    assert!(built.stderr.contains("told by the third"), "{built}");
    let third = built.stdout.trim();
    nix.run("nix-store", ["--store", local, "--verify-path", third]).succeeds();
    let references = nix.run("nix-store", ["--store", local, "--query", "--references", third]).succeeds();
    assert_eq!(references.stdout.trim(), first);

    // Another connection, to a daemon that has been started again.
    daemon.end().succeeds();
    let daemon = Daemon::start(&cofferdam, "");
    let other = nix.store("other");
    let other = other.to_str().unwrap();
    let copy = ["copy", "--no-check-sigs", "--from", &nix.builder(), "--to", other, &second];
    nix.run("nix", copy).succeeds();
    assert_eq!(fs::read_to_string(format!("{other}{second}")).unwrap(), contents);
    nix.run("nix-store", ["--store", other, "--verify-path", &first, &second]).succeeds();
    daemon.end().succeeds();
}

#[test]
fn newer_nixes_build_the_same_chain() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    let mut built = [Release::Trixie, Release::Forky].map(|release| {
        let nix = Nix::new(&cofferdam, &daemon, release);
        let built = nix.build(CHAIN).succeeds();
        let second = built.stdout.trim().to_owned();
        let store = nix.store("local");
        let store = store.to_str().unwrap();
        nix.run("nix-store", ["--store", store, "--verify-path", &second]).succeeds();
        let references = nix.run("nix-store", ["--store", store, "--query", "--references", &second]).succeeds();
        assert!(references.stdout.trim().ends_with("-first"), "{references}");
        (second, built.stderr)
    });
    // The second client finds what the first has built.
    assert_eq!(built[0].0, built[1].0);
    assert!(built[0].1.contains("told by the first"), "{}", built[0].1);
    assert!(!std::mem::take(&mut built[1].1).contains("told by the first"));
    daemon.end().succeeds();
}

#[test]
fn nixes_build_by_older_versions_of_the_protocol() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    for (release, minors) in [(Release::Bookworm, &[21, 32, 34][..]), (Release::Trixie, &[35])] {
        let nix = Nix::new(&cofferdam, &daemon, release);
        for minor in minors {
            let expression = format!(
                r#"make "by-{minor}" "read word < ${{builtins.toFile "input" "sent by {minor}\n"}}; echo $word > $out""#
            );
            let built = nix.build_at(&nix.builder_of(*minor), &expression).succeeds();
            let path = built.stdout.trim();
            let local = nix.store("local");
            assert_eq!(fs::read_to_string(local.join(&path[1..])).unwrap(), format!("sent by {minor}\n"));
            nix.run("nix-store", ["--store", local.to_str().unwrap(), "--verify-path", path]).succeeds();
        }
    }
    daemon.end().succeeds();
}

/// Two derivations whose outputs break rules of theirs.
const REJECTED: [(&str, &str); 2] = [
    (
        r#"
          let input = builtins.toFile "input" "";
          in derivation {
            name = "refers";
            system = "x86_64-linux";
            builder = "/bin/sh";
            disallowedReferences = [ input ];
            args = [ "-c" "echo ${input} > $out" ];
          }
        "#,
        "is not allowed to refer to",
    ),
    (
        r#"
          derivation {
            name = "large";
            system = "x86_64-linux";
            builder = "/bin/sh";
            __structuredAttrs = true;
            outputChecks.out.maxSize = 100;
            args = [ "-c" "i=0; while [ $i -lt 100 ]; do echo $i; i=$((i + 1)); done > ${placeholder "out"}" ];
          }
        "#,
        "is too large",
    ),
];

#[test]
fn outputs_that_break_a_rule_of_their_derivation_are_rejected() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    let nix = Nix::new(&cofferdam, &daemon, Release::Trixie);
    for (expression, rule) in REJECTED {
        let path =
            nix.run("nix-instantiate", ["--eval", "--json", "-E", &format!("({expression}).outPath")]).succeeds();
        let path: String = serde_json::from_str(&path.stdout).unwrap();
        let rejected = nix.build(expression).exits_with(1);
        assert!(rejected.stderr.contains(rule), "{rejected}");
        let known = nix.run("nix", ["path-info", "--store", &nix.builder(), &path]).exits_with(1);
        assert!(known.stderr.contains("is not valid"), "{known}");
    }
    daemon.end().succeeds();
}

/// Two derivations of `make` that a third one needs, and one that needs a failing one.
const GRAPH: &str = r#"
    let
      left = make "left" "echo told by the left >&2; echo left > $out";
      right = make "right" "echo told by the right >&2; echo right > $out";
      failing = make "failing" "echo its last words >&2; exit 3";
    in {
      top = make "top" "read a < ${left}; read b < ${right}; echo $a $b > $out";
      broken = make "broken" "echo ${failing} ${left} > $out";
    }
"#;

#[test]
fn nixes_build_graphs_in_the_store_of_a_daemon() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "[store]\nisolation = 'tenants'");
    let path = |outcome: &Outcome| outcome.stdout.trim().to_owned();
    let graph = with_make(GRAPH);
    let top = format!("({graph}).top");

    let nix = Nix::new(&cofferdam, &daemon, Release::Trixie);
    let store = nix.builder();
    let build = ["build", "--impure", "--no-link", "--print-out-paths", "-L", "--eval-store", "auto", "--store"];
    let build_top = [&build[..], &[&store, "--expr", &top]].concat();
    let first = nix.run("nix", &build_top).succeeds();
    assert!(first.stderr.contains("told by the left") && first.stderr.contains("told by the right"), "{first}");
    let cat = nix.run("nix", ["store", "cat", "--store", &store, &path(&first)]).succeeds();
    assert_eq!(cat.stdout, "left right\n");

    // Another version of Nix finds all of it.
    let nix = Nix::new(&cofferdam, &daemon, Release::Forky);
    let second = nix.run("nix", &build_top).succeeds();
    assert_eq!(path(&first), path(&second));
    assert!(!second.stderr.contains("told by"), "{second}");

    // An old one puts the derivations into the daemon's store itself.
    let nix = Nix::new(&cofferdam, &daemon, Release::Bookworm);
    let build = ["--no-out-link", "--store", &store, "-E", &graph, "-A"];
    let third = nix.run("nix-build", [&build[..], &["top"]].concat()).succeeds();
    assert_eq!(path(&first), path(&third));
    let broken = nix.run("nix-build", [&build[..], &["broken"]].concat()).exits_with(1);
    assert!(broken.stderr.contains("its last words"), "{broken}");
    assert!(broken.stderr.contains("-broken.drv' can't be built: its dependency '/nix/store/"), "{broken}");
    assert!(broken.stderr.contains("the command exited with status 3"), "{broken}");
    assert!(!broken.stderr.contains("told by"), "{broken}");
    daemon.end().succeeds();
}

#[test]
fn each_key_has_paths_of_its_own_and_only_listed_users_speak_for_keys() {
    let cofferdam = Cofferdam::new();
    let uid = nix::unistd::getuid();
    let daemon = Daemon::start(&cofferdam, &format!("[nix]\nspeakers = [{uid}]\n[store]\nisolation = 'tenants'"));
    let nix = Nix::new(&cofferdam, &daemon, Release::Trixie);
    let (alice, bob) = (nix.builder_for("alice"), nix.builder_for("bob"));
    let file = cofferdam.file("a-file", "told to nobody");
    let add = |store: &str| nix.run("nix-store", ["--store", store, "--add", file.to_str().unwrap()]);
    let path = add(&alice).succeeds().stdout.trim().to_owned();
    let info = |store: &str| nix.run("nix", ["path-info", "--store", store, &path]);
    assert_eq!(info(&alice).succeeds().stdout.trim(), path);
    for other in [&bob, &nix.builder()] {
        let refused = info(other).exits_with(1);
        assert!(refused.stderr.contains("is not valid"), "{refused}");
    }
    let refused = add(&nix.builder_for("a%2fb")).exits_with(1);
    assert!(refused.stderr.contains("must have 1 to 64 letters, digits"), "{refused}");
    daemon.end().succeeds();

    let daemon = Daemon::start(&cofferdam, "[nix]\nspeakers = [65534]");
    let refused = info(&alice).exits_with(1);
    let denied = format!("user:{uid} may not speak for other clients");
    assert!(refused.stderr.contains(&denied), "{refused}");
    daemon.end().succeeds();

    let daemon =
        Daemon::start(&cofferdam, &format!("[nix]\nspeakers = [{uid}]\n[tenants.'user:{uid}']\n[tenants.'key:alice']"));
    assert_eq!(info(&alice).succeeds().stdout.trim(), path);
    let refused = info(&bob).exits_with(1);
    assert!(refused.stderr.contains("key:bob is no tenant of this daemon"), "{refused}");
    daemon.end().succeeds();
}

#[test]
fn the_holder_of_a_key_builds_through_a_real_sshd() {
    let cofferdam = Cofferdam::new();
    let uid = nix::unistd::getuid();
    let daemon = Daemon::start(&cofferdam, &format!("[nix]\nspeakers = [{uid}]"));
    let command = format!("{} --daemon {} nix-daemon --stdio --client alice", program().display(), daemon.addr());
    let sshd = Sshd::start(&cofferdam, &command);
    let nix = Nix::new(&cofferdam, &daemon, Release::Forky).with_ssh(sshd.options());
    let derivation = |name: &str| format!("make \"{name}\" \"echo told by $name >&2; echo $name > $out\"");
    // The serve protocol is asked for as `nix-store --serve --write`, which the forced command learns from sshd.
    let paths = ["ssh-ng", "ssh"].map(|scheme| {
        let built = nix.build_at(&format!("{scheme}://127.0.0.1"), &derivation(scheme)).succeeds();
        assert!(built.stderr.contains(&format!("told by {scheme}")), "{built}");
        built.stdout.trim().to_owned()
    });
    for path in &paths {
        nix.run("nix", ["path-info", "--store", &nix.builder_for("alice"), path]).succeeds();
        let refused = nix.run("nix", ["path-info", "--store", &nix.builder_for("bob"), path]).exits_with(1);
        assert!(refused.stderr.contains("is not valid"), "{refused}");
    }
    drop(sshd);
    daemon.end().succeeds();
}

#[test]
fn paths_are_signed_and_clients_that_are_not_trusted_need_signatures() {
    let cofferdam = Cofferdam::new();
    let (secret, public) = (cofferdam.files().join("secret"), cofferdam.files().join("public"));
    let (secret, public) = (secret.to_str().unwrap(), public.to_str().unwrap());
    let daemon = Daemon::start(&cofferdam, "");
    let nix = Nix::new(&cofferdam, &daemon, Release::Trixie);
    nix.run("nix-store", ["--generate-binary-cache-key", "friend-1", secret, public]).succeeds();
    let friend = fs::read_to_string(public).unwrap();
    daemon.end().succeeds();
    let config = format!("[nix]\nrequire_signatures = true\ntrusted_keys = ['{friend}']");
    let daemon = Daemon::start(&cofferdam, &config);

    // Builds go on: this client uploads derivations now, since it is told that it isn't trusted.
    let built = nix.build(CHAIN).succeeds();
    let second = built.stdout.trim();
    let own = fs::read_to_string(cofferdam.state_directory().join("nix/signing.pub")).unwrap();
    let other = nix.store("other");
    let other = other.to_str().unwrap();
    let copy = |keys: &str| {
        let builder = nix.builder();
        nix.run("nix", ["copy", "--trusted-public-keys", keys, "--from", &builder, "--to", other, second])
    };
    let refused = copy(friend.trim()).exits_with(1);
    assert!(refused.stderr.contains("lacks a signature by a trusted key"), "{refused}");
    copy(own.trim()).succeeds();

    // To a daemon with another key, and without these paths, they are a stranger's.
    daemon.end().succeeds();
    fs::remove_dir_all(cofferdam.state_directory().join("nix")).unwrap();
    let daemon = Daemon::start(&cofferdam, &config);
    let push = || nix.run("nix", ["copy", "--no-check-sigs", "--from", other, "--to", &nix.builder(), second]);
    let refused = push().exits_with(1);
    assert!(refused.stderr.contains("lacks a signature by a trusted key"), "{refused}");
    nix.run("nix", ["store", "sign", "--recursive", "--store", other, "--key-file", secret, second]).succeeds();
    push().succeeds();

    // A path that refers to itself, and is addressed by its contents as Nix computes that.
    let itself = CHAIN.replace("echo $word ${first} > $out", "echo $out ${first} > $out");
    let built = nix.build(&itself).succeeds();
    let local = nix.store("local");
    let local = local.to_str().unwrap();
    // Old versions of Nix compute another hash.
    let old = Nix::new(&cofferdam, &daemon, Release::Bookworm);
    let paths = [&nix, &old].map(|nix| {
        let rewrite =
            ["store", "make-content-addressed", "--json", "--from", local, "--to", other, built.stdout.trim()];
        let rewritten: serde_json::Value = serde_json::from_str(&nix.run("nix", rewrite).succeeds().stdout).unwrap();
        let rewritten = rewritten["rewrites"][built.stdout.trim()].as_str().unwrap().to_owned();
        let references = nix.run("nix-store", ["--store", other, "--query", "--references", &rewritten]).succeeds();
        assert!(references.stdout.contains(&rewritten), "{references}");
        nix.run("nix", ["copy", "--from", other, "--to", &nix.builder(), &rewritten]).succeeds();
        rewritten
    });
    assert_ne!(paths[0], paths[1]);
    daemon.end().succeeds();
}

/// Three outputs of which each refers to the next one, from a build that takes a while or never ends.
fn three_outputs(ends: bool) -> String {
    let (script, end) = match ends {
        true => ("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done", "ends"),
        false => ("while :; do :; done", "never-ends"),
    };
    format!(
        r#"derivation {{
          name = "{end}";
          system = "x86_64-linux";
          builder = "/bin/sh";
          outputs = [ "out" "dev" "doc" ];
          args = [ "-c" "echo it has begun >&2; {script}; echo $dev > $out; echo $doc > $dev; echo text > $doc" ];
        }}"#
    )
}

#[test]
fn a_build_whose_client_is_killed_is_kept_for_it_or_cancelled() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "[nix]\nfinish_abandoned = true");
    let nix = Nix::new(&cofferdam, &daemon, Release::Forky);
    let store = nix.builder();
    let builds = |daemon: &Daemon| {
        let list = cofferdam.command(["builds", "--daemon", &daemon.addr(), "list", "--json"]).succeeds();
        list.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<serde_json::Value>>()
    };
    let build = |ends| {
        let expression = three_outputs(ends);
        nix.start("nix-build", ["--no-out-link", "--store", &store, "-E", &expression, "-A", "all"])
    };
    let running = build(true);
    running.wait_for("it has begun").signal(Signal::SIGKILL);
    running.end();
    let built = build(true).end().succeeds();
    assert_eq!(builds(&daemon).len(), 1, "it has joined the first one");
    let output = |end: &str| built.stdout.lines().find(|path| path.ends_with(end)).unwrap();
    let references = |path: &str| {
        let query = nix.run("nix-store", ["--store", &store, "--query", "--references", path]).succeeds();
        query.stdout.trim().to_owned()
    };
    assert_eq!(references(output("-ends")), output("-ends-dev"));
    assert_eq!(references(output("-ends-dev")), output("-ends-doc"));
    assert_eq!(references(output("-ends-doc")), "");
    daemon.end().succeeds();

    let daemon = Daemon::start(&cofferdam, "[nix]\nkeep_alive = '1s'");
    let running = build(false);
    running.wait_for("it has begun").wait_for("-never-ends.drv is not done after ").signal(Signal::SIGKILL);
    running.end();
    let begun = Instant::now();
    while builds(&daemon).iter().any(|build| build["state"] == "running") {
        assert!(begun.elapsed() < stretched(Duration::from_secs(60)), "it still runs: {:?}", builds(&daemon));
    }
    daemon.end().succeeds();
}

#[test]
fn fetches_of_nix_itself_are_built_by_rules_and_checked_even_by_md5() {
    let lab = Lab::new(env!("CARGO_BIN_EXE_network-lab"));
    let cofferdam = lab.cofferdam();
    let daemon = Daemon::start(&cofferdam, "[network]\nallow = ['good.example']\nresolvers = ['10.0.0.53:53']");
    let nix = Nix::new(&cofferdam, &daemon, Release::Trixie);
    let text = "this is good.example\n";
    let expected = cofferdam.file("expected", text);
    fs::set_permissions(&expected, fs::Permissions::from_mode(0o755)).unwrap();
    let hash = nix.run("nix-hash", ["--type", "md5", expected.to_str().unwrap()]).succeeds();
    let fetch = |host: &str| {
        let hash = hash.stdout.trim();
        let what = format!(r#"{{ url = "http://{host}/file"; md5 = "{hash}"; executable = true; }}"#);
        nix.build(&format!("import <nix/fetchurl.nix> {what}"))
    };
    let refused = fetch("evil.example").exits_with(1);
    assert!(refused.stderr.contains("the build wanted evil.example, which no rule allows"), "{refused}");
    let fetched = format!("{}{}", nix.store("local").display(), fetch("good.example").succeeds().stdout.trim());
    assert_eq!(fs::read_to_string(&fetched).unwrap(), text);
    assert_ne!(fs::metadata(&fetched).unwrap().permissions().mode() & 0o111, 0);
    daemon.end().succeeds();
}
