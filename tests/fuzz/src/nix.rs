//! Targets for the decoders of Nix's formats.

use std::io::Read as _;

use cofferdam_nix::{
    Derivation, PathInfo, Realisation,
    wire::{Framed, Reader, Writer},
};

const PATH: &str = "/nix/store/ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-second";

/// A derivation's text survives.
pub fn derivation_text(bytes: &[u8]) -> bool {
    let Ok(derivation) = Derivation::parse(bytes) else { return false };
    assert_eq!(Derivation::parse(&derivation.to_text()).as_ref(), Ok(&derivation));
    true
}

pub(crate) fn derivation_text_seeds() -> Vec<Vec<u8>> {
    let hash = "01ba4719c80b6fe911b091a7c05124b64eeece964e09c058ef8f9805daca546b";
    let rest = r#"[("/nix/store/0sbm8kqi5zyp3iyc6allh3lj0rygk0fw-a.drv",["dev","out"])],["/nix/store/0sbm8kqi5zyp3iyc6allh3lj0rygk0fw-b"],"x86_64-linux","/bin/sh",["-c","\n\\"],[("k","v\t\"")])"#;
    let outputs = [
        format!(r#"("dev","{PATH}-dev","",""),("out","{PATH}","","")"#),
        format!(r#"("out","{PATH}","r:sha256","{hash}")"#),
        r#"("out","","r:sha256","")"#.to_owned(),
        r#"("out","","","")"#.to_owned(),
    ];
    outputs.map(|outputs| format!("Derive([{outputs}],{rest}").into_bytes()).into()
}

/// Messages of a client. The first byte says which.
pub fn messages(bytes: &[u8]) -> bool {
    let Some((kind, bytes)) = bytes.split_first() else { return false };
    match kind {
        0 => Derivation::read(&mut Reader::new(bytes)).is_ok(),
        1 => {
            let Ok(info) = PathInfo::read(&mut Reader::new(bytes)) else { return false };
            let mut again = Writer(Vec::new());
            info.write(&mut again).expect("memory has room");
            assert_eq!(PathInfo::read(&mut Reader::new(&*again.0)).ok(), Some(info));
            true
        }
        3 => {
            let Ok(text) = std::str::from_utf8(bytes) else { return false };
            let Ok(realisation) = Realisation::from_json(text) else { return false };
            let again = realisation.to_json();
            assert_eq!(Realisation::from_json(&again).ok(), Some(realisation));
            true
        }
        _ => {
            let mut contents = Vec::new();
            Framed::new(bytes).read_to_end(&mut contents).is_ok_and(|read| read < bytes.len())
        }
    }
}

pub(crate) fn messages_seeds() -> Vec<Vec<u8>> {
    let written = |kind, write: &dyn Fn(&mut Writer<Vec<u8>>) -> std::io::Result<()>| {
        let mut writer = Writer(vec![kind]);
        write(&mut writer).expect("memory has room");
        writer.0
    };
    let derivation = written(0, &|writer| {
        writer.integer(1_u64)?;
        for text in ["out", PATH, "", ""] {
            writer.text(text)?;
        }
        writer.texts([PATH])?;
        writer.text("x86_64-linux")?;
        writer.text("/bin/sh")?;
        writer.texts(["-c", "true"])?;
        writer.integer(1_u64)?;
        writer.text("key")?;
        writer.text("value")
    });
    let info = written(1, &|writer| {
        writer.text("")?;
        writer.text("01ba4719c80b6fe911b091a7c05124b64eeece964e09c058ef8f9805daca546b")?;
        writer.texts([PATH])?;
        for word in [1_u64, 96, 1] {
            writer.integer(word)?;
        }
        writer.texts(["key:signature"])?;
        writer.text("fixed:r:sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73")
    });
    let frames = [&[2, 3, 0, 0, 0, 0, 0, 0, 0], &b"abc"[..], &[0; 8]].concat();
    let id = "sha256:01ba4719c80b6fe911b091a7c05124b64eeece964e09c058ef8f9805daca546b!out";
    let path = "ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-second";
    let realisation = format!(
        r#"{{"id":"{id}","outPath":"{path}","signatures":["key:signature"],"dependentRealisations":{{"{id}":"{path}"}}}}"#
    );
    vec![derivation, info, frames, [&[3], realisation.as_bytes()].concat()]
}
