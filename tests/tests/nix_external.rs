//! Builds that a Nix of this host hands over: `external-builders` of nix.conf.

use std::{fs, time::Duration};

use cofferdam_tests::{Cofferdam, Daemon, nix::Nix, slots};
use nix::sys::signal::Signal;

/// Derivations that show what Nix has prepared for them, and which kernel they see.
const CHAIN: &str = r#"
    let
      first = derivation {
        name = "first";
        system = "x86_64-linux";
        builder = "/bin/sh";
        outputs = [ "out" "dev" ];
        text = "passed as a file";
        passAsFile = [ "text" ];
        args = [ "-c" ''
          echo told by the first >&2
          read boot < /proc/sys/kernel/random/boot_id
          read text < $textPath
          echo "$boot" > $out
          echo "$text and $out" > $dev
        '' ];
      };
    in derivation {
      name = "second";
      system = "x86_64-linux";
      builder = "/bin/sh";
      __structuredAttrs = true;
      numbers = [ 1 2 ];
      exportReferencesGraph.graph = [ first ];
      args = [ "-c" ''
        out=${builtins.placeholder "out"}
        read boot < ${first}
        read dev < ${first.dev}
        IFS= read -r attributes < "$NIX_ATTRS_JSON_FILE" || true
        printf '%s\n%s\n%s\n' "$boot" "$dev" "$attributes" > $out
      '' ];
    }
"#;

/// A derivation whose output is fixed, and whose script has an exit status.
fn fixed(text: &str, status: u8) -> String {
    format!(
        r#"derivation {{
          name = "fixed";
          system = "x86_64-linux";
          builder = "/bin/sh";
          args = [ "-c" "echo its last words >&2; echo {text} > $out; exit {status}" ];
          outputHashAlgo = "sha256";
          outputHash = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        }}"#
    )
}

#[test]
fn a_nix_of_this_host_runs_its_builds_in_machines() {
    let cofferdam = Cofferdam::new();
    let _slot = slots::take_one();
    let nix = Nix::with_external_builder(&cofferdam, &[]);
    let store = nix.store("local");
    let built = nix.start_here(CHAIN).end().succeeds();
    assert!(built.stderr.contains("told by the first"), "{built}");
    let second = built.stdout.trim();
    let text = fs::read_to_string(format!("{}{second}", store.display())).unwrap();
    let lines: Vec<_> = text.lines().collect();
    let [boot, dev, attributes] = lines[..] else { panic!("{text}") };
    let boot_here = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(boot.len(), boot_here.trim().len(), "{boot}");
    assert_ne!(boot, boot_here.trim(), "it has run on this host's kernel");
    let first = dev.strip_prefix("passed as a file and ").unwrap();
    let attributes: serde_json::Value = serde_json::from_str(attributes).unwrap();
    assert_eq!(attributes["numbers"], serde_json::json!([1, 2]));
    assert_eq!(attributes["graph"][0]["path"], first);
    // Nix has scanned it for references itself, and has its hash.
    let local = store.to_str().unwrap();
    let references = nix.run("nix-store", ["--store", local, "--query", "--references", second]).succeeds();
    assert!(references.stdout.contains(first), "{references}");
    nix.run("nix-store", ["--store", local, "--verify-path", second, first]).succeeds();

    let failed = nix.start_here(&fixed("hello", 7)).end().exits_with(1);
    assert!(failed.stderr.contains("its last words"), "{failed}");
    assert!(failed.stderr.contains("builder failed with exit code 7"), "{failed}");
    let wrong = nix.start_here(&fixed("something else", 0)).end().exits_with(102);
    assert!(wrong.stderr.contains("hash mismatch in fixed-output derivation"), "{wrong}");
    nix.start_here(&fixed("hello", 0)).end().succeeds();
    let builtin = fixed("", 0).replace("/bin/sh", "builtin:fetchurl").replace("\"fixed\"", "\"builtin\"");
    let refused = nix.start_here(&builtin).end().exits_with(1);
    assert!(refused.stderr.contains("builder must be a program"), "{refused}");
}

#[test]
fn inputs_are_read_once_and_again_when_they_were_collected() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    let nix = Nix::with_external_builder(&cofferdam, &["--daemon", &daemon.addr()]);
    let source = cofferdam.file("source/text", "old\n");
    let show = |name: &str| {
        let expression = format!(
            r#"derivation {{
              name = "{name}";
              system = "x86_64-linux";
              builder = "/bin/sh";
              source = {};
              args = [ "-c" "read text < $source/text; echo $source $text > $out" ];
            }}"#,
            source.parent().unwrap().display()
        );
        let built = nix.start_here(&expression).end().succeeds();
        let out = format!("{}{}", nix.store("local").display(), built.stdout.trim());
        let text = fs::read_to_string(out).unwrap();
        let (source, text) = text.trim().split_once(' ').unwrap();
        (source.to_owned(), text.to_owned())
    };
    let (path, text) = show("first");
    assert_eq!(text, "old");
    // Nobody may do this to a store path. It shows that the file isn't read again.
    fs::write(format!("{}{path}/text", nix.store("local").display()), "new\n").unwrap();
    assert_eq!(show("second").1, "old");
    daemon.end().succeeds();
    fs::remove_dir_all(cofferdam.state_directory().join("store")).unwrap();
    let daemon = Daemon::start(&cofferdam, "");
    assert_eq!(show("third").1, "new");
    daemon.end().succeeds();
}

#[test]
fn a_killed_nix_leaves_nothing_of_its_build() {
    let cofferdam = Cofferdam::new();
    let _slot = slots::take_one();
    let nix = Nix::with_external_builder(&cofferdam, &[]);
    let endless = fixed("", 0).replace("exit 0", "while :; do :; done");
    let running = nix.start_here(&endless);
    running.wait_for("its last words");
    assert!(cofferdam.processes().len() > 2, "{:#?}", cofferdam.processes());
    running.signal(Signal::SIGKILL);
    running.end();
    cofferdam.processes_are_gone_within(Duration::from_secs(30));
    assert!(cofferdam.leftovers().is_empty(), "{:#?}", cofferdam.leftovers());
}

/// Evaluates the module with a `lib` of this test, which has as much of nixpkgs' as the module uses.
const MODULE: &str = r#"
    let
      inherit (builtins) attrNames foldl' isAttrs mapAttrs;
      merge = a: b: a // mapAttrs (n: v: if isAttrs v && isAttrs (a.${n} or null) then merge a.${n} v else v) b;
      lib = {
        mkEnableOption = description: { inherit description; };
        mkOption = option: option;
        mkIf = condition: value: if condition then value else { };
        mkMerge = foldl' merge { };
        mapAttrsToList = f: set: map (name: f name set.${name}) (attrNames set);
        types = { package = { }; path = { }; str = { }; bool = { }; anything = { }; attrsOf = type: type; };
      };
      pkgs = {
        formats.toml = { }: { type = { }; generate = name: value: value; };
        qemu_kvm = "qemu";
        e2fsprogs = "e2fsprogs";
      };
      evaluated = cofferdam: import MODULE {
        inherit lib pkgs;
        config = {
          services = { inherit cofferdam; };
          environment.etc."cofferdam/daemon.toml".source = "";
        };
      };
      module = evaluated {
        enable = true;
        package = "/package";
        image = "/image";
        settings = { };
        keys.alice = "ssh-ed25519 AAAA";
        localBuilds = true;
        builders = { };
      };
      client = evaluated {
        enable = false;
        keys = { };
        localBuilds = false;
        builders."builder.example".maxJobs = 32;
      };
    in {
      client = client.config;
      options = attrNames module.options.services.cofferdam;
      described = builtins.all (option: option ? description) (builtins.attrValues module.options.services.cofferdam);
      inherit (module) config;
    }
"#;

#[test]
fn the_files_for_nixos_are_what_nix_can_read() {
    let cofferdam = Cofferdam::new();
    let nix = Nix::with_external_builder(&cofferdam, &[]);
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../images/nix");
    for name in ["module.nix", "package.nix", "flake.nix"] {
        nix.run("nix-instantiate", ["--parse", &format!("{directory}/{name}")]).succeeds();
    }
    let expression = MODULE.replace("MODULE", &format!("{directory}/module.nix"));
    let shown = nix.run("nix-instantiate", ["--eval", "--strict", "--json", "-E", &expression]).succeeds();
    let module: serde_json::Value = serde_json::from_str(&shown.stdout).unwrap();
    assert_eq!(
        module["options"],
        serde_json::json!(["builders", "enable", "image", "keys", "localBuilds", "package", "settings"])
    );
    assert_eq!(module["described"], true);
    let config = &module["config"];
    assert_eq!(config["services"]["cofferdam"]["settings"]["nix"]["speakers"][0], "cofferdam-nix");
    let builders: serde_json::Value =
        serde_json::from_str(config["nix"]["settings"]["external-builders"].as_str().unwrap()).unwrap();
    assert_eq!(builders[0]["program"], "/package/bin/cofferdam");
    assert_eq!(builders[0]["args"][0], "nix-external-builder");
    let key = config["users"]["users"]["cofferdam-nix"]["openssh"]["authorizedKeys"]["keys"][0].as_str().unwrap();
    assert!(
        key.starts_with("command=\"/package/bin/cofferdam --daemon grpc+unix:///run/cofferdam/daemon.sock"),
        "{key}"
    );
    assert!(key.ends_with("nix-daemon --stdio --client alice\",restrict ssh-ed25519 AAAA"), "{key}");
    let machine = serde_json::json!({
        "hostName": "builder.example",
        "protocol": "ssh-ng",
        "sshUser": "cofferdam-nix",
        "systems": ["x86_64-linux"],
        "supportedFeatures": ["big-parallel", "benchmark"],
        "maxJobs": 32,
    });
    // A host that has only its builds elsewhere needs nothing else.
    let client = serde_json::json!({ "nix": { "distributedBuilds": true, "buildMachines": [machine] } });
    assert_eq!(module["client"], client);
}
