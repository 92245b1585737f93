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
    assert!(!modulo.is_deferred && modulo.output_id("out").ends_with("!out"));
    // A derivation that is known only after a build makes those that need it so, too.
    let floating = Derivation { outputs: [("out".to_owned(), Output::Deferred)].into(), ..first };
    let known = floating.modulo(|_| None).unwrap();
    assert!(known.is_deferred && second.modulo(|_| Some(&known)).unwrap().is_deferred);
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
