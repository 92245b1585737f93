use super::*;
use crate::{Algorithm, Method};

/// Written by Nix 2.8.0.
const SECOND: &str = r#"Derive([("out","/nix/store/ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-second","","")],[("/nix/store/0sbm8kqi5zyp3iyc6allh3lj0rygk0fw-first.drv",["out"])],[],"x86_64-linux","/bin/sh",["-c","echo /nix/store/rwfshijbhhchwxcmqy4ijrqa7jccs8qz-first > $out"],[("builder","/bin/sh"),("name","second"),("out","/nix/store/ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-second"),("system","x86_64-linux")])"#;

#[test]
fn the_text_of_nix_is_read_and_written_again() {
    let derivation = Derivation::parse(SECOND.as_bytes()).unwrap();
    assert_eq!(String::from_utf8(derivation.to_text()).unwrap(), SECOND);
    assert_eq!(derivation.builder, "/bin/sh");
    assert_eq!(derivation.attribute("name"), Some("second"));
    let (path, names) = derivation.input_derivations.first_key_value().unwrap();
    assert_eq!((path.name(), names.len()), ("first.drv", 1));
    let out = derivation.outputs["out"].path().unwrap();
    assert_eq!(out.base_name(), "ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-second");
}

/// The derivation that [`SECOND`] needs, by the same Nix.
const FIRST: &str = r#"Derive([("out","/nix/store/rwfshijbhhchwxcmqy4ijrqa7jccs8qz-first","","")],[],[],"x86_64-linux","/bin/sh",["-c","echo hi > $out"],[("builder","/bin/sh"),("name","first"),("out","/nix/store/rwfshijbhhchwxcmqy4ijrqa7jccs8qz-first"),("system","x86_64-linux")])"#;

#[test]
fn the_paths_of_outputs_follow_from_the_derivations_as_in_nix() {
    let [first, second] = [FIRST, SECOND].map(|text| Derivation::parse(text.as_bytes()).unwrap());
    let known = first.modulo(|_| None).unwrap();
    assert_eq!(known.output_path("first", "out").as_ref().ok(), first.outputs["out"].path());
    assert_eq!(second.modulo(|_| None), None);
    let modulo = second.modulo(|path| (path.name() == "first.drv").then_some(&known)).unwrap();
    assert_eq!(modulo.output_path("second", "out").as_ref().ok(), second.outputs["out"].path());
    assert_eq!(modulo.output_path("second", "dev").unwrap().name(), "second-dev");
    assert!(!modulo.is_deferred && modulo.output_id("out").to_string().ends_with("!out"));
    // A derivation that is known only after a build makes those that need it so, too.
    let floating = Derivation { outputs: [("out".to_owned(), Output::Deferred)].into(), ..first };
    let known = floating.modulo(|_| None).unwrap();
    assert!(known.is_deferred && second.modulo(|_| Some(&known)).unwrap().is_deferred);
}

/// Floating derivations and one that needs them, by Nix 2.34.8, and what it resolved them to.
const FLOATING: &str = r#"Derive([("dev","","r:sha256",""),("out","","r:sha256","")],[("/nix/store/ai0fvh31hh17b0v3llqk2n0yzqz5lqa1-first.drv",["out"])],[],"x86_64-linux","/bin/sh",["-c","echo $dev $out > $out; echo /13zqsp01jx18kafagcgv1hmnmmabzvg35n3mfbv5vqaswvc0iygz $dev > $dev"],[("builder","/bin/sh"),("dev","/02qcpld1y6xhs5gz9bchpxaw0xdhmsp5dv88lh25r2ss44kh8dxz"),("name","two"),("out","/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9"),("outputHashAlgo","sha256"),("outputHashMode","recursive"),("outputs","out dev"),("system","x86_64-linux")])"#;
const FLOATING_RESOLVED: &str = r#"Derive([("dev","","r:sha256",""),("out","","r:sha256","")],[],["/nix/store/6ji1386f0ml97vmacwncp5kdyvzplsfh-first"],"x86_64-linux","/bin/sh",["-c","echo $dev $out > $out; echo /nix/store/6ji1386f0ml97vmacwncp5kdyvzplsfh-first $dev > $dev"],[("builder","/bin/sh"),("dev","/02qcpld1y6xhs5gz9bchpxaw0xdhmsp5dv88lh25r2ss44kh8dxz"),("name","two"),("out","/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9"),("outputHashAlgo","sha256"),("outputHashMode","recursive"),("outputs","out dev"),("system","x86_64-linux")])"#;
const DEFERRED: &str = r#"Derive([("out","","","")],[("/nix/store/5a5ks8igqz2x5c154h5nhxnip4g915vw-two.drv",["dev"]),("/nix/store/blvhp5yg4qlswrraja6n121bgzs1qg3w-second.drv",["out"])],[],"x86_64-linux","/bin/sh",["-c","echo /03r5qqfs51j33s49k0bkz98ypl8kyxmp973mpj7qd51cxvlk47n6 /1qckkqqfhr5q0rskmlaxxmgi23r68qdlfnpql46ir03n58bfiikh > $out"],[("builder","/bin/sh"),("name","plain"),("out",""),("system","x86_64-linux")])"#;
const DEFERRED_RESOLVED: &str = r#"Derive([("out","/nix/store/db4i1ijkgsnwgvzgyq87f2xmkm868ha0-plain","","")],[],["/nix/store/cs47jxh541x1vh95nxszlxkzcxrdlffl-second","/nix/store/xhn14h9530555pjqnfbx5aa3xmngjyl1-two-dev"],"x86_64-linux","/bin/sh",["-c","echo /nix/store/cs47jxh541x1vh95nxszlxkzcxrdlffl-second /nix/store/xhn14h9530555pjqnfbx5aa3xmngjyl1-two-dev > $out"],[("builder","/bin/sh"),("name","plain"),("out","/nix/store/db4i1ijkgsnwgvzgyq87f2xmkm868ha0-plain"),("system","x86_64-linux")])"#;

#[test]
fn derivations_are_resolved_as_nix_does() {
    let path_of = |derivation: &StorePath, output: &str| {
        let found = match (derivation.name(), output) {
            ("first.drv", "out") => "6ji1386f0ml97vmacwncp5kdyvzplsfh-first",
            ("two.drv", "dev") => "xhn14h9530555pjqnfbx5aa3xmngjyl1-two-dev",
            ("second.drv", "out") => "cs47jxh541x1vh95nxszlxkzcxrdlffl-second",
            _ => return None,
        };
        StorePath::from_base_name(found).ok()
    };
    for (name, text, resolved, paths) in [
        ("two", FLOATING, FLOATING_RESOLVED, ["5a5ks8igqz2x5c154h5nhxnip4g915vw", "awrrwf5c6rs97fvwi8lsh1w7vvapqhw1"]),
        (
            "plain",
            DEFERRED,
            DEFERRED_RESOLVED,
            ["dzbwmww7sv5h07nji6ficachpbmvr04q", "fr2slnkc4wdbznqi1l25qyyd37264mxa"],
        ),
    ] {
        let derivation = Derivation::parse(text.as_bytes()).unwrap();
        assert!(derivation.is_unresolved());
        assert_eq!(derivation.path(name).unwrap().hash_part(), paths[0]);
        let found = derivation.clone().resolved(name, path_of).unwrap();
        assert_eq!(String::from_utf8(found.to_text()).unwrap(), resolved);
        assert_eq!(found.path(name).unwrap().hash_part(), paths[1]);
        let error = derivation.resolved(name, |_, _| None).unwrap_err();
        assert!(error.contains("has no path"), "{error}");
    }
}

#[test]
fn the_ids_of_outputs_are_those_of_nix() {
    let resolved = Derivation::parse(FLOATING_RESOLVED.as_bytes()).unwrap();
    let id = resolved.modulo(|_| None).unwrap().output_id("dev").to_string();
    assert_eq!(id, "sha256:779742eceaf1312b166604dfb2e666ced386362b87524fd246a23f5954d7ea10!dev");
    let first = r#"Derive([("out","","r:sha256","")],[],[],"x86_64-linux","/bin/sh",["-c","echo first > $out"],[("builder","/bin/sh"),("name","first"),("out","/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9"),("outputHashAlgo","sha256"),("outputHashMode","recursive"),("system","x86_64-linux")])"#;
    let first = Derivation::parse(first.as_bytes()).unwrap();
    assert_eq!(first.path("first").unwrap().hash_part(), "ai0fvh31hh17b0v3llqk2n0yzqz5lqa1");
    let first = first.modulo(|_| None).unwrap();
    let id = first.output_id("out").to_string();
    assert_eq!(id, "sha256:b32424dc3368f39c011c57b4ad398153bc4898e6d765c76c42d930d7246239fb!out");
    let floating = Derivation::parse(FLOATING.as_bytes()).unwrap().modulo(|_| Some(&first)).unwrap();
    let id = floating.output_id("out").to_string();
    assert_eq!(id, "sha256:e37b70f7f874ee919f0e434c2f481a2ecd998c4cedb46086cd0fda78f9689e3e!out");
}

#[test]
fn floating_outputs_are_built_where_nix_builds_them() {
    let derivation = StorePath::from_base_name("d33g87w63pqzy953pc1cfl6i2iz288kk-scratch.drv").unwrap();
    for (output, path) in
        [("out", "3scxvc1p9p4mlz6hk305rq178picd6q9-scratch"), ("dev", "jr33zdiq0wyzw40w099gy9bkpgaxn1lm-scratch-dev")]
    {
        assert_eq!(derivation.scratch(output).unwrap().base_name(), path);
    }
}

#[test]
fn escapes_stand_for_their_characters() {
    let text = SECOND.replace("\"second\"", r#""a\n\r\t\"\\b""#);
    let derivation = Derivation::parse(text.as_bytes()).unwrap();
    assert_eq!(derivation.environment["name"], b"a\n\r\t\"\\b");
    assert_eq!(String::from_utf8(derivation.to_text()).unwrap(), text);
}

#[test]
fn broken_texts_are_refused_with_the_place() {
    for end in 0..SECOND.len() {
        assert!(Derivation::parse(&SECOND.as_bytes()[..end]).is_err(), "{end}");
    }
    for (from, to, expected) in [
        ("Derive(", "DrvWithVersion(", "must be \"Derive(\", not \"DrvWith\""),
        ("(\"builder\"", "(\"name\",\"x\"),(\"builder\"", "the environment must not have \"name\" twice"),
        ("[(\"out\"", "[(\"\"", "an output's name must consist of letters"),
        ("second\",\"\",\"\")", "second\",\"\",\"x\")", "an output must not have the hash \"x\" without a function"),
        ("second\",\"\",\"\")", "second\",\"r:sha3\",\"\")", "not \"r:sha3\""),
        ("/nix/store/0sbm8", "/tmp/0sbm8", "must lie in /nix/store"),
    ] {
        let broken = SECOND.replacen(from, to, 1);
        let error = Derivation::parse(broken.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let error = Derivation::parse(format!("{SECOND} ").as_bytes()).unwrap_err().to_string();
    assert!(error.ends_with("must end here"), "{error}");
}

#[test]
fn each_kind_of_output_is_told_by_its_texts() {
    let path = "/nix/store/ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-second";
    let hash = crate::Hash::of(b"x").base16();
    for (texts, is_right) in [
        ([path, "", ""], (|output| matches!(output, Output::InputAddressed(_))) as fn(&Output) -> bool),
        ([path, "r:sha256", &hash], |output| matches!(output, Output::Fixed { .. })),
        (["", "r:sha256", ""], |output| {
            matches!(output, Output::Floating { method: Method::Recursive, algorithm: Algorithm::Sha256 })
        }),
        (["", "", ""], |output| matches!(output, Output::Deferred)),
    ] {
        let [path, function, hash] = texts;
        let output = Output::parse(path, function, hash).unwrap();
        assert!(is_right(&output), "{output:?}");
        assert_eq!(output.texts(), texts);
    }
}
