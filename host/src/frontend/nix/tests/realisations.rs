//! What floating outputs have become. The texts are of Nix 2.34.8.

use cofferdam_nix::{OutputId, Realisation};

use super::{
    graph::{Told, add, build, results},
    *,
};

const FIRST_DRV: &str = "/nix/store/ai0fvh31hh17b0v3llqk2n0yzqz5lqa1-first.drv";
const FIRST: &str = r#"Derive([("out","","r:sha256","")],[],[],"x86_64-linux","/bin/sh",["-c","echo first > $out"],[("builder","/bin/sh"),("name","first"),("out","/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9"),("outputHashAlgo","sha256"),("outputHashMode","recursive"),("system","x86_64-linux")])"#;
const FIRST_ID: &str = "sha256:b32424dc3368f39c011c57b4ad398153bc4898e6d765c76c42d930d7246239fb!out";

const TWO_DRV: &str = "/nix/store/5a5ks8igqz2x5c154h5nhxnip4g915vw-two.drv";
const TWO: &str = r#"Derive([("dev","","r:sha256",""),("out","","r:sha256","")],[("/nix/store/ai0fvh31hh17b0v3llqk2n0yzqz5lqa1-first.drv",["out"])],[],"x86_64-linux","/bin/sh",["-c","echo $dev $out > $out; echo /13zqsp01jx18kafagcgv1hmnmmabzvg35n3mfbv5vqaswvc0iygz $dev > $dev"],[("builder","/bin/sh"),("dev","/02qcpld1y6xhs5gz9bchpxaw0xdhmsp5dv88lh25r2ss44kh8dxz"),("name","two"),("out","/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9"),("outputHashAlgo","sha256"),("outputHashMode","recursive"),("outputs","out dev"),("system","x86_64-linux")])"#;
/// The one that [`TWO`] is resolved to, when `first` has the path that it has by Nix.
const RESOLVED_DRV: &str = "/nix/store/awrrwf5c6rs97fvwi8lsh1w7vvapqhw1-two.drv";
const RESOLVED: &str = "sha256:779742eceaf1312b166604dfb2e666ced386362b87524fd246a23f5954d7ea10";
const TWO_ID: &str = "sha256:e37b70f7f874ee919f0e434c2f481a2ecd998c4cedb46086cd0fda78f9689e3e";

/// Tells what an output has become.
fn register(said: &mut Said, id: &str, path: &StorePath) -> io::Result<()> {
    ask(said, Operation::RegisterDrvOutput)?;
    said.text(Realisation::new(id.parse().unwrap(), path.clone()).to_json())
}

fn query(said: &mut Said, id: &str) -> io::Result<()> {
    ask(said, Operation::QueryRealisation)?;
    said.text(id)
}

/// The path in the answer of [`query`], if there is one.
fn answered(heard: &mut Heard) -> Option<StorePath> {
    match heard.last().integer() {
        0 => None,
        1 => Some(Realisation::from_json(&heard.0.text("a realisation").unwrap()).unwrap().path),
        count => panic!("{count} realisations"),
    }
}

/// What is registered as the path of `first`.
fn first() -> Tree {
    let tree = tree("target");
    let path = StorePath::from_base_name("6ji1386f0ml97vmacwncp5kdyvzplsfh-first").unwrap();
    Tree { path, info: PathInfo { content_address: None, ..tree.info }, ..tree }
}

#[test]
fn a_realisation_is_its_clients_and_told_in_each_dialect() {
    let (server, first) = (Server::new(), first());
    for version in [27, 30, 31, 38] {
        let version = Version::minor(version);
        let mut heard = server.talk(ALICE, version, |said| {
            add_multiple(said, true, &[&first])?;
            query(said, FIRST_ID)?;
            if version < Version::minor(31) {
                ask(said, Operation::RegisterDrvOutput)?;
                said.text(FIRST_ID)?;
                said.text(first.path.base_name())?;
            } else {
                register(said, FIRST_ID, &first.path)?;
            }
            query(said, FIRST_ID)
        });
        heard.last();
        if version == Version::minor(27) {
            assert_eq!(answered(&mut heard), None);
        } else {
            assert_eq!(heard.last().integer(), 1);
            heard.0.text("a path or a realisation").unwrap();
        }
        assert_eq!(heard.last().integer(), 0x616c_7473, "registering has no answer");
        assert_eq!(heard.integer(), 1);
        let told = heard.0.text("a path or a realisation").unwrap();
        match version < Version::minor(31) {
            true => assert_eq!(told, first.path.to_string()),
            false => assert_eq!(Realisation::from_json(&told).unwrap().path, first.path),
        }
        heard.end();
    }
    let mut heard = server.talk(BOB, Version::minor(31), |said| query(said, FIRST_ID));
    assert_eq!(answered(&mut heard), None);
    heard.end();
}

#[test]
fn a_realisation_goes_with_its_path() {
    let (server, first) = (Server::new(), first());
    let mut heard = server.talk(ALICE, Version::minor(31), |said| {
        add_multiple(said, true, &[&first])?;
        register(said, FIRST_ID, &first.path)
    });
    heard.last().last();
    heard.end();
    server.nix.paths.forget(&ALICE, &BTreeSet::from([first.path])).unwrap();
    let mut heard = server.talk(ALICE, Version::minor(31), |said| query(said, FIRST_ID));
    assert_eq!(answered(&mut heard), None);
    heard.end();
}

#[test]
fn forged_realisations_are_refused() {
    let (server, first, other) = (Server::new(), first(), tree("another"));
    let signed = |signatures: Vec<String>| {
        let signatures = signatures.into_iter().collect();
        Realisation { signatures, ..Realisation::new(FIRST_ID.parse().unwrap(), first.path.clone()) }.to_json()
    };
    let (many, long) = ((0..33).map(|at| format!("a:{at}")).collect(), vec!["x".repeat(513)]);
    let huge = "x".repeat(100_000);
    let (json, others_path) = (signed(Vec::new()), tree("nobody's").path);
    let cases = [
        (json.replace("!out", "!"), "the realisation has an id that must be an output such as"),
        (json.replace("sha256:b3", "sha256:z3"), "the realisation has an id that must be an output such as"),
        (json.replace("6ji1386f0", "../../etc"), "the realisation has a path that must begin with 32 digits"),
        (json.replace(first.path.base_name(), others_path.base_name()), "is not valid"),
        (json.replace(first.path.base_name(), other.path.base_name()), "must stay '/nix/store/6ji1386f0"),
        ("{".to_owned(), "the realisation must be a realisation in JSON, not \"{\""),
        (String::new(), "the realisation must be a realisation in JSON, not \"\""),
        (huge, "the realisation must have at most 65536 bytes, not 100000"),
        (signed(many), "must have at most 32 signatures, not 33"),
        (signed(long), "must have at most 512 bytes, not 513"),
    ];
    let mut heard = server.talk(ALICE, Version::minor(38), |said| {
        add_multiple(said, true, &[&first, &other])?;
        register(said, FIRST_ID, &first.path)?;
        for (text, _) in &cases {
            ask(said, Operation::RegisterDrvOutput)?;
            said.text(text)?;
        }
        query(said, "sha256:b3!out")?;
        query(said, FIRST_ID)
    });
    heard.last().last();
    for (text, expected) in &cases {
        let error = heard.error();
        assert!(error.contains(expected), "{text}: {error}");
    }
    assert!(heard.error().starts_with("the output must be an output such as"));
    assert_eq!(answered(&mut heard), Some(first.path));
    heard.end();
    let mut heard = server.talk(ALICE, Version::minor(38), |said| {
        ask(said, Operation::RegisterDrvOutput)?;
        said.integer(1_u64 << 40)
    });
    assert!(heard.error().starts_with("the realisation would take the message beyond 33554432 bytes"));
    heard.end();
}

#[test]
fn a_client_that_is_not_trusted_needs_a_signature() {
    let (server, other) = (Server::with(Store::memory(), true, true), tree("target"));
    let mut signed = Realisation::new(FIRST_ID.parse().unwrap(), other.path.clone());
    server.nix.keys.sign_realisation(&mut signed);
    let elsewhere = Realisation { id: OutputId { output: "dev".to_owned(), ..signed.id.clone() }, ..signed.clone() };
    let unsigned = Realisation { signatures: BTreeSet::new(), ..signed.clone() };
    let heard = server.raw(ALICE, &*{
        let mut said = Writer(Vec::new());
        hello(&mut said, Version::minor(34)).unwrap();
        add_multiple(&mut said, false, &[&other]).unwrap();
        for realisation in [&unsigned, &elsewhere, &signed] {
            ask(&mut said, Operation::RegisterDrvOutput).unwrap();
            said.text(realisation.to_json()).unwrap();
        }
        query(&mut said, FIRST_ID).unwrap();
        said.0
    });
    let mut reader = Reader::new(io::Cursor::new(heard));
    check_hello(&mut reader, Version::minor(34)).unwrap();
    let mut heard = Heard(reader);
    heard.last();
    for id in [FIRST_ID, &elsewhere.id.to_string()] {
        let expected = format!("cannot register realisation '{id}' because it lacks a signature by a trusted key");
        assert_eq!(heard.error(), expected);
    }
    assert_eq!(answered(heard.last()), Some(other.path));
    heard.end();
}

/// Begins to build the outputs of `two`, and asks for their paths.
fn build_two(said: &mut Said) -> io::Result<()> {
    build(said, Operation::BuildPathsWithResults, &[&format!("{TWO_DRV}!*")], 0)?;
    ask(said, Operation::QueryDerivationOutputMap)?;
    said.text(TWO_DRV)
}

/// Skips what is said up to an answer.
fn skip_to_answer(heard: &mut Heard) {
    let (input, mark) = (heard.0.input(), 0x616c_7473_u64.to_le_bytes());
    let at = usize::try_from(input.position()).unwrap();
    let found = input.get_ref()[at..].chunks(8).position(|word| word == mark).unwrap();
    input.set_position((at + (found + 1) * 8) as u64);
}

#[test]
fn a_derivation_is_resolved_with_what_its_inputs_have_become() {
    let (server, first) = (Server::new(), first());
    let mut heard = server.talk(ALICE, Version::minor(34), |said| {
        add(said, "first.drv", "text:sha256", &[], FIRST.as_bytes())?;
        add(said, "two.drv", "text:sha256", &[FIRST_DRV], TWO.as_bytes())?;
        build_two(said)
    });
    for expected in [FIRST_DRV, TWO_DRV] {
        assert_eq!(heard.last().0.text("the path").unwrap(), expected);
        PathInfo::read(&mut heard.0).unwrap();
    }
    // Its input is built first, which fails here.
    skip_to_answer(&mut heard);
    assert_eq!(results(&mut heard)[0].status, 10);
    skip_to_answer(&mut heard);
    assert_eq!(heard.integer(), 2);
    assert_eq!([(); 4].map(|()| heard.0.text("a name or path").unwrap()), ["dev", "", "out", ""]);
    heard.end();
    let requests = std::mem::take(&mut *server.requests.lock());
    let scratch = StorePath::parse(FIRST_DRV).unwrap().scratch("out").unwrap();
    assert_eq!(requests[0].outputs, [scratch.to_string()[1..].to_owned()]);
    assert_eq!(requests[0].environment_vars.iter().find(|var| var.key == "out").unwrap().value, scratch.to_string());
    assert_eq!(requests.len(), 1);

    let mut heard = server.talk(ALICE, Version::minor(34), |said| {
        add_multiple(said, true, &[&first])?;
        register(said, FIRST_ID, &first.path)?;
        build_two(said)
    });
    heard.last().last();
    skip_to_answer(&mut heard);
    assert_eq!(results(&mut heard)[0].status, 6);
    let request = server.requests.lock().pop().unwrap();
    let resolved = StorePath::parse(RESOLVED_DRV).unwrap();
    let script = format!("echo $dev $out > $out; echo {} $dev > $dev", first.path);
    assert_eq!(request.command_args[2], script);
    let mut scratches = ["dev", "out"].map(|output| resolved.scratch(output).unwrap());
    scratches.sort();
    assert_eq!(request.outputs, scratches.map(|path| path.to_string()[1..].to_owned()));
    assert!(!request.constraints.unwrap().network_access);
}

#[test]
fn what_the_resolved_derivation_has_become_is_not_built_again() {
    let (server, first, [dev, out]) = (Server::new(), first(), ["dev", "out"].map(tree));
    let mut heard = server.talk(ALICE, Version::minor(34), |said| {
        add(said, "first.drv", "text:sha256", &[], FIRST.as_bytes())?;
        add(said, "two.drv", "text:sha256", &[FIRST_DRV], TWO.as_bytes())?;
        add_multiple(said, true, &[&first, &dev, &out])?;
        register(said, FIRST_ID, &first.path)?;
        register(said, &format!("{RESOLVED}!dev"), &dev.path)?;
        register(said, &format!("{RESOLVED}!out"), &out.path)
    });
    heard.last();
    let mut heard = server.talk(ALICE, Version::minor(34), |said| {
        build_two(said)?;
        query(said, &format!("{TWO_ID}!dev"))
    });
    let told: Vec<Told> = results(heard.last());
    assert_eq!((told[0].status, told[0].outputs.len()), (2, 2), "{told:?}");
    assert_eq!(told[0].outputs[1].0, format!("{TWO_ID}!out"));
    let realisation = Realisation::from_json(&told[0].outputs[1].1).unwrap();
    assert_eq!((&realisation.path, realisation.signatures.len()), (&out.path, 1));
    assert!(server.nix.keys.trust_realisation(&realisation));
    assert_eq!(heard.last().integer(), 2);
    for expected in ["dev", &dev.path.to_string(), "out", &out.path.to_string()] {
        assert_eq!(heard.0.text("a name or path").unwrap(), expected);
    }
    assert_eq!(answered(&mut heard), Some(dev.path));
    heard.end();
    assert!(server.requests.lock().is_empty());
    let mut heard = server.talk(BOB, Version::minor(34), |said| query(said, &format!("{RESOLVED}!dev")));
    assert_eq!(answered(&mut heard), None);
}
