use cofferdam_proto::snix::build::v1::build_request::{AdditionalFile, BuildConstraints};

use super::*;
use crate::request::BuildRequest;

const DERIVATION: &str = "/nix/store/wmj2r79gfpngnphqib663hbn0lwfm628-second.drv";
const OUT: &str = "/nix/store/ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-second";

/// Asks to build a derivation with these outputs, inputs and attributes.
fn build(
    said: &mut Said,
    outputs: &[[&str; 4]],
    inputs: &[&StorePath],
    environment: &[(&str, &str)],
) -> io::Result<()> {
    build_by(said, ["x86_64-linux", "/bin/sh"], outputs, inputs, environment)
}

/// The same, with this system and builder.
fn build_by(
    said: &mut Said,
    [system, builder]: [&str; 2],
    outputs: &[[&str; 4]],
    inputs: &[&StorePath],
    environment: &[(&str, &str)],
) -> io::Result<()> {
    ask(said, Operation::BuildDerivation)?;
    said.text(DERIVATION)?;
    said.integer(outputs.len() as u64)?;
    outputs.iter().flatten().try_for_each(|text| said.text(text))?;
    said.texts(inputs)?;
    said.text(system)?;
    said.text(builder)?;
    said.texts(["-c", "true"])?;
    said.integer(environment.len() as u64)?;
    for (key, value) in environment {
        said.text(key)?;
        said.text(value)?;
    }
    said.integer(0_u64)
}

/// The status and the message of a build for clients from 1.37 on.
fn result(heard: &mut Heard) -> (u64, String) {
    let told = (heard.last().integer(), heard.0.text("the message").unwrap());
    for _ in 0..4 {
        heard.integer();
    }
    assert_eq!([heard.integer(), heard.integer()], [0, 0], "the time of the processor is not known");
    assert_eq!(heard.integer(), 0, "no output is content-addressed");
    told
}

/// Skips the begin of an activity.
fn begun(heard: &mut Heard) {
    assert_eq!([heard.integer(), heard.integer(), heard.integer(), heard.integer()], [0x5354_5254, 1, 3, 105]);
    assert_eq!(heard.0.text("the text").unwrap(), format!("building '{DERIVATION}'"));
    assert_eq!((heard.integer(), heard.integer()), (4, 1));
    assert_eq!(heard.0.text("the derivation").unwrap(), DERIVATION);
    assert_eq!((heard.integer(), heard.0.text("the host").unwrap()), (1, String::new()));
    assert_eq!([0; 5].map(|_| heard.integer()), [0, 1, 0, 1, 0]);
}

#[test]
fn a_build_has_the_environment_that_nix_gives_it() {
    let (server, tree) = (Server::new(), tree("target"));
    let environment = [
        ("out", OUT),
        ("PATH", "/mine"),
        ("HOME", "/mine"),
        ("TMPDIR", "/not"),
        ("passAsFile", "text"),
        ("text", "a\nb"),
    ];
    let mut heard = server.talk(ALICE, Version::minor(37), |said| {
        add_multiple(said, true, &[&tree])?;
        build(said, &[["out", OUT, "", ""]], &[&tree.path], &environment)
    });
    begun(heard.last());
    assert_eq!((heard.integer(), heard.integer()), (0x5354_4f50, 1));
    let (status, message) = result(&mut heard);
    assert_eq!(status, 6);
    assert_eq!(message, format!("builder for '{DERIVATION}' failed: too many builds wait\ntry again later"));
    heard.end();

    let request = server.requests.lock().pop().unwrap();
    let vars: Vec<_> =
        request.environment_vars.iter().map(|var| (&*var.key, std::str::from_utf8(&var.value).unwrap())).collect();
    let file = "/build/.attr-1lf969yddshzhld7sr1vbagr07bnygg99lgl6gk5kxcnp4z9wbcq";
    let expected = [
        ("HOME", "/mine"),
        ("NIX_BUILD_CORES", "3"),
        ("NIX_BUILD_TOP", "/build"),
        ("NIX_LOG_FD", "2"),
        ("NIX_STORE", "/nix/store"),
        ("PATH", "/mine"),
        ("PWD", "/build"),
        ("TEMP", "/build"),
        ("TEMPDIR", "/build"),
        ("TERM", "xterm-256color"),
        ("TMP", "/build"),
        ("TMPDIR", "/build"),
        ("out", OUT),
        ("passAsFile", "text"),
        ("textPath", file),
    ];
    assert_eq!(vars, expected);
    let files = [AdditionalFile { path: file[1..].to_owned(), contents: "a\nb".into() }];
    assert_eq!(request.additional_files, files);
    assert_eq!(request.command_args, ["/bin/sh", "-c", "true"]);
    assert_eq!(request.outputs, ["nix/store/ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-second"]);
    assert_eq!(request.refscan_needles, [tree.path.hash_part(), "ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48"]);
    let constraints =
        BuildConstraints { system: "x86_64-linux".to_owned(), provide_bin_sh: true, ..Default::default() };
    assert_eq!(request.constraints, Some(constraints));
    let request = BuildRequest::try_from(request).unwrap();
    assert_eq!(request.inputs.keys().map(ToString::to_string).collect::<Vec<_>>(), [tree.path.base_name()]);
}

#[test]
fn what_can_not_be_built_is_named() {
    let missing = tree("target").path;
    let hash = Hash::of(b"").base16();
    type Outputs<'a> = &'a [[&'a str; 4]];
    type Environment<'a> = &'a [(&'a str, &'a str)];
    let cases: [(Outputs<'_>, &[&StorePath], Environment<'_>, &str); 10] = [
        (&[["out", OUT, "", ""]], &[&missing], &[], "is not valid here"),
        (&[], &[], &[], "must have outputs"),
        (&[["out", OUT, "r:sha256", &hash]], &[], &[], "the output out must have the path /nix/store/"),
        (&[["out", "", "r:md5", ""]], &[], &[], "the output out must have another hash function than md5"),
        (&[["out", "", "text:sha1", ""]], &[], &[], "the output out must have the hash function sha256 for a text"),
        (&[["out", "", "", ""]], &[], &[], "the output out must have a path"),
        (&[["a", "", "sha256", ""], ["b", OUT, "", ""]], &[], &[], "all 2 outputs must be floating or none, not 1"),
        (&[["a", OUT, "", ""], ["b", OUT, "", ""]], &[], &[], "must not have the same path, as a and b have"),
        (&[["out", OUT, "", ""]], &[], &[("requiredSystemFeatures", "kvm recursive-nix")], "\"recursive-nix\" is not"),
        (&[["out", OUT, "", ""]], &[], &[("__noChroot", "1")], "__noChroot must not be set"),
    ];
    for (outputs, inputs, environment, expected) in cases {
        let server = Server::new();
        let mut heard = server.talk(ALICE, Version::minor(37), |said| build(said, outputs, inputs, environment));
        let (status, message) = result(&mut heard);
        assert_eq!(status, 9, "{message}");
        assert!(message.contains(expected), "{message}");
        assert!(server.requests.lock().is_empty());
        heard.end();
    }
}

#[test]
fn an_output_that_is_there_is_not_built_again() {
    let (server, mut tree) = (Server::new(), tree("target"));
    tree.path = StorePath::parse(OUT).unwrap();
    tree.info.content_address = None;
    let mut heard = server.talk(ALICE, Version::minor(37), |said| {
        add_multiple(said, true, &[&tree])?;
        build(said, &[["out", OUT, "", ""]], &[], &[])
    });
    assert_eq!(result(heard.last()), (2, String::new()));
    heard.end();
    let mut heard = server.talk(BOB, Version::minor(37), |said| build(said, &[["out", OUT, "", ""]], &[], &[]));
    begun(&mut heard);
    assert_eq!(server.requests.lock().len(), 1);
}

#[test]
fn placeholders_become_paths_and_graphs_become_files() {
    let (server, tree) = (Server::new(), tree("target"));
    // `builtins.placeholder "out"`.
    let placeholder = "/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9";
    let (there, exported) = (format!("in {placeholder}/bin:{placeholder}"), format!("graph {}", tree.path));
    let environment = [("there", &*there), ("exportReferencesGraph", &exported), ("other", "/1rz4/usr")];
    server.talk(ALICE, Version::minor(37), |said| {
        add_multiple(said, true, &[&tree])?;
        build(said, &[["out", OUT, "", ""]], &[&tree.path], &environment)
    });
    let request = server.requests.lock().pop().unwrap();
    let var = |key: &str| &request.environment_vars.iter().find(|var| var.key == key).unwrap().value;
    assert_eq!(*var("there"), format!("in {OUT}/bin:{OUT}"));
    assert_eq!(*var("other"), "/1rz4/usr");
    let graph = format!("{}\n\n0\n", tree.path);
    let files = [AdditionalFile { path: "build/graph".to_owned(), contents: graph.into() }];
    assert_eq!(request.additional_files, files);
}

#[test]
fn structured_attributes_are_files_and_no_variables() {
    let server = Server::new();
    let json = r#"{"name":"a","requiredSystemFeatures":["kvm"]}"#;
    server.talk(ALICE, Version::minor(37), |said| build(said, &[["out", OUT, "", ""]], &[], &[("__json", json)]));
    let request = server.requests.lock().pop().unwrap();
    let keys: Vec<_> = request.environment_vars.iter().map(|var| &*var.key).collect();
    assert!(!keys.contains(&"__json") && !keys.contains(&"name"), "{keys:?}");
    let files: Vec<_> = request
        .additional_files
        .iter()
        .map(|file| (&*file.path, std::str::from_utf8(&file.contents).unwrap()))
        .collect();
    let written = format!(r#"{{"name":"a","outputs":{{"out":"{OUT}"}},"requiredSystemFeatures":["kvm"]}}"#);
    let shell = format!(
        "declare name='a'\ndeclare -A outputs=(['out']='{OUT}' )\ndeclare -a requiredSystemFeatures=('kvm' )\n"
    );
    assert_eq!(files, [("build/.attrs.json", &*written), ("build/.attrs.sh", &*shell)]);
    for (key, path) in [("NIX_ATTRS_JSON_FILE", "/build/.attrs.json"), ("NIX_ATTRS_SH_FILE", "/build/.attrs.sh")] {
        assert_eq!(request.environment_vars.iter().find(|var| var.key == key).unwrap().value, path);
    }
    assert_eq!(request.constraints.unwrap().available_ro_paths, ["/dev/kvm"]);
}

/// A fixed output of this hash of a file, as a derivation of `DERIVATION`'s name has it.
fn fixed(hash: &Hash) -> [String; 3] {
    let address = ContentAddress { method: Method::Flat, hash: hash.clone() };
    let path = address.path("second", &BTreeSet::new(), false).unwrap();
    [path.to_string(), hash.algorithm().name().to_owned(), hash.base16()]
}

#[test]
fn fetches_are_commands_with_the_network_and_the_configured_variables() {
    let server = Server::new();
    let [path, algorithm, hash] = fixed(&Hash::of(b"fetched"));
    let environment =
        [("out", &*path), ("url", "http://a/b"), ("executable", "1"), ("impureEnvVars", "http_proxy no_proxy")];
    let mut heard = server.talk(ALICE, Version::minor(37), |said| {
        build_by(said, ["builtin", "builtin:fetchurl"], &[["out", &path, &algorithm, &hash]], &[], &environment)
    });
    begun(&mut heard);
    let request = server.requests.lock().pop().unwrap();
    assert_eq!(request.command_args[..2], ["/bin/sh", "-ec"]);
    assert!(request.command_args[2].starts_with(r#"wget -q -O "$out" "$url""#), "{:?}", request.command_args);
    let constraints = request.constraints.as_ref().unwrap();
    assert!(constraints.network_access && constraints.system == "x86_64-linux", "{constraints:?}");
    let var = |key: &str| {
        let var = request.environment_vars.iter().find(|var| var.key == key);
        var.map(|var| std::str::from_utf8(&var.value).unwrap())
    };
    assert_eq!([var("url"), var("http_proxy"), var("no_proxy")], [Some("http://a/b"), Some("http://proxy"), Some("")]);
    BuildRequest::try_from(request.clone()).unwrap();

    // Only fixed outputs have them.
    let environment = [("impureEnvVars", "http_proxy")];
    server.talk(ALICE, Version::minor(37), |said| build(said, &[["out", OUT, "", ""]], &[], &environment));
    let request = server.requests.lock().pop().unwrap();
    assert!(request.environment_vars.iter().all(|var| var.key != "http_proxy"));
}

#[test]
fn other_builders_of_nix_are_refused() {
    let [path, algorithm, hash] = fixed(&Hash::of(b"fetched"));
    let (floating, fixed) = (["out", OUT, "", ""], ["out", &*path, &*algorithm, &*hash]);
    type Case<'a> = (&'a str, [&'a str; 4], (&'a str, &'a str), &'a str);
    let cases: [Case<'_>; 4] = [
        ("builtin:buildenv", fixed, ("a", "b"), "not \"builtin:buildenv\": build it where Nix is"),
        ("builtin:fetchurl", floating, ("a", "b"), "a derivation of \"builtin:fetchurl\" must have a fixed output"),
        ("builtin:fetchurl", fixed, ("unpack", "1"), "unpack must not be set for \"builtin:fetchurl\" here"),
        ("builtin:fetchurl", fixed, ("__json", "{}"), "must not have structured attributes here"),
    ];
    for (builder, output, variable, expected) in cases {
        let server = Server::new();
        let mut heard = server
            .talk(ALICE, Version::minor(37), |said| build_by(said, ["builtin", builder], &[output], &[], &[variable]));
        let (status, message) = result(&mut heard);
        assert_eq!(status, 9, "{message}");
        assert!(message.contains(expected), "{message}");
        assert!(server.requests.lock().is_empty());
    }
}
