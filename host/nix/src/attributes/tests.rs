//! The files in `testdata` were made by Nix 2.34.8: a derivation, and what its builder found.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::{Algorithm, Hash, PathInfo};

const DERIVATION: &[u8] = include_bytes!("../testdata/attributes.drv");

fn known(path: &str, hash: &str, size: u64, references: &[&StorePath], address: &str) -> (StorePath, PathInfo) {
    let info = PathInfo {
        deriver: None,
        nar_hash: Hash::parse(Algorithm::Sha256, hash).unwrap(),
        nar_size: size,
        references: references.iter().map(|path| (*path).clone()).collect(),
        registration_time: 7,
        ultimate: false,
        signatures: BTreeSet::new(),
        content_address: Some(address.parse().unwrap()),
    };
    (StorePath::from_base_name(path).unwrap(), info)
}

fn plain(environment: &[(&str, &str)]) -> Derivation {
    let environment = environment.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())).collect();
    Derivation { environment, ..Derivation::default() }
}

/// Two files, of which the second refers to the first.
fn files() -> [(StorePath, PathInfo); 2] {
    let dep = known(
        "wkb38adhw4i46sxpcl84c1g6wxsylyag-dep",
        "0rsv7kag23nvdpy4500mv2m0b4sm4c8fkgqrfsrmv1kgk77bi81c",
        120,
        &[],
        "text:sha256:10a83a91g1r50bdw8g4hn47m7j7m6angpabwc80l9c16nx11cw9d",
    );
    let other = known(
        "l2cgd23x5ka66y31lhpa67zmklklkayh-dep2",
        "05wl0n3ix9f4qrk0bvic49hynrbdywd1csxv88hmskig6nsxykm5",
        176,
        &[&dep.0],
        "text:sha256:1f7k2wz1qd8aqsranp906mmd07b4vz5snsw6xm1a4vqk9bvmsq58",
    );
    [dep, other]
}

#[test]
fn structured_attributes_are_written_as_nix_writes_them() {
    let derivation = Derivation::parse(DERIVATION).unwrap();
    let attributes = Attributes::of(&derivation).unwrap();
    assert!(attributes.are_structured());
    let files = files();
    let graph = Graph(files.iter().map(|(path, info)| (path, info)).collect::<BTreeMap<_, _>>());
    let graphs = attributes.graphs().unwrap();
    let graphs = graphs.into_iter().map(|(name, paths)| (name, graph.json(&paths).unwrap())).collect();
    let written = attributes.files(graphs).unwrap();
    let json = include_str!("../testdata/attributes.json").trim_end();
    assert_eq!(String::from_utf8(written.json).unwrap(), json);
    let shell = include_str!("../testdata/attributes.sh");
    assert_eq!(String::from_utf8(written.shell).unwrap(), shell);
    let checks = attributes.checks("out").unwrap();
    assert_eq!(checks, Checks { max_size: Some(100_000), ..Checks::default() });
    assert_eq!(attributes.checks("dev").unwrap(), Checks::default());
}

#[test]
fn a_graph_is_registered_as_nix_registers_it() {
    let [dep, other] = files();
    let path = other.0.to_string();
    let derivation = plain(&[("exportReferencesGraph", &format!("graph {path}"))]);
    let graphs = Attributes::of(&derivation).unwrap().graphs().unwrap();
    assert_eq!(graphs, [("graph".to_owned(), vec![other.0.clone()])]);
    let graph = Graph([(&dep.0, &dep.1), (&other.0, &other.1)].into());
    let dep = &dep.0;
    assert_eq!(graph.registration(&graphs[0].1), format!("{path}\n\n1\n{dep}\n{dep}\n\n0\n"));
}

#[test]
fn attributes_of_an_environment_are_words() {
    let derivation =
        plain(&[("allowedReferences", " out  dev\n"), ("disallowedRequisites", ""), ("__noChroot", "1"), ("b", "0")]);
    let attributes = Attributes::of(&derivation).unwrap();
    let checks = attributes.checks("out").unwrap();
    assert_eq!(checks.allowed_references, Some(vec!["out".to_owned(), "dev".to_owned()]));
    assert_eq!((checks.disallowed_requisites, checks.allowed_requisites), (Some(Vec::new()), None));
    assert!(checks.ignores_itself);
    assert!(attributes.flag("__noChroot") && !attributes.flag("b"));
    assert_eq!(attributes.files(Vec::new()), None);
}

#[test]
fn wrong_attributes_are_named() {
    let refused = |environment: &[(&str, &str)], read: fn(&Attributes<'_>) -> Option<String>| {
        let derivation = plain(environment);
        match Attributes::of(&derivation) {
            Ok(attributes) => read(&attributes).unwrap(),
            Err(error) => error,
        }
    };
    let graphs = |attributes: &Attributes<'_>| attributes.graphs().err();
    let checks = |attributes: &Attributes<'_>| attributes.checks("out").err();
    for (error, expected) in [
        (refused(&[("__json", "[]")], graphs), "__json must be an object in JSON"),
        (refused(&[("exportReferencesGraph", "a")], graphs), "must have a path after each name, not 1 words"),
        (refused(&[("exportReferencesGraph", "../a /nix/store/x")], graphs), "must name files by letters"),
        (refused(&[("exportReferencesGraph", "a /etc")], graphs), "must lie in /nix/store, not \"/etc\""),
        (refused(&[("__json", r#"{"outputChecks":{"out":{"maxSize":-1}}}"#)], checks), "maxSize must be a number"),
        (
            refused(&[("__json", r#"{"outputChecks":{"out":{"allowedReferences":[1]}}}"#)], checks),
            "allowedReferences must be a list of strings, not [1]",
        ),
    ] {
        assert!(error.contains(expected), "{error}");
    }
    let large = "x".repeat(MAX_JSON_BYTES + 1);
    assert!(refused(&[("__json", &large)], graphs).contains("must not have more than 4194304 bytes"));
}
