//! A client against a server of the test's own, over real connections. The whole-system tests have a real registry.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    sync::Arc,
    thread,
};

use cofferdam_castore::{Store, archive::Limits};
use serde_json::json;
use tokio::runtime::Runtime;

use super::*;
use crate::oci::import;

/// What the server answers to a path and an `Authorization`: a status, headers and a body.
type Answer = (u16, Vec<String>, Vec<u8>);

/// Serves on a port of this host until the test's process ends. `answer` gets the server's own address first.
fn serve(answer: impl Fn(&str, &str, Option<&str>) -> Answer + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, answer) = (listener.local_addr().unwrap().to_string(), Arc::new(answer));
    let own = address.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (own, answer) = (own.clone(), Arc::clone(&answer));
            thread::spawn(move || speak(stream.unwrap(), &own, &*answer));
        }
    });
    address
}

fn speak(mut stream: TcpStream, own: &str, answer: &dyn Fn(&str, &str, Option<&str>) -> Answer) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(request)) = lines.next() else { return };
    let path = request.split(' ').nth(1).unwrap().to_owned();
    let headers = lines.map_while(Result::ok).take_while(|line| !line.is_empty());
    let headers =
        headers.filter_map(|line| line.split_once(": ").map(|(key, value)| (key.to_lowercase(), value.to_owned())));
    let headers: HashMap<_, _> = headers.collect();
    let (status, headers_out, body) = answer(own, &path, headers.get("authorization").map(String::as_str));
    let headers_out: String = headers_out.iter().map(|header| format!("{header}\r\n")).collect();
    let length = match headers_out.contains("content-length") {
        true => String::new(),
        false => format!("content-length: {}\r\n", body.len()),
    };
    let head = format!("HTTP/1.1 {status} S\r\n{headers_out}{length}connection: close\r\n\r\n");
    let _ = stream.write_all(&[head.as_bytes(), &body].concat());
}

/// The documents and layer of an image, by their paths in the repository `a`.
fn image() -> (HashMap<String, Vec<u8>>, Digest) {
    let layer = vec![0; 1024];
    let config = json!({ "os": "linux", "architecture": "amd64", "rootfs": { "diff_ids": [] } }).to_string();
    let descriptor = |bytes: &[u8]| json!({ "digest": Digest::of(bytes).to_string(), "size": bytes.len() });
    let manifest = json!({ "config": descriptor(config.as_bytes()), "layers": [descriptor(&layer)] }).to_string();
    let digest = Digest::of(manifest.as_bytes());
    let mut all = HashMap::new();
    for blob in [config.into_bytes(), layer] {
        all.insert(format!("/v2/a/blobs/{}", Digest::of(&blob)), blob);
    }
    all.insert(format!("/v2/a/manifests/{digest}"), manifest.clone().into_bytes());
    all.insert("/v2/a/manifests/t".to_owned(), manifest.into_bytes());
    (all, digest)
}

fn found(all: &HashMap<String, Vec<u8>>, path: &str) -> Answer {
    match all.get(path) {
        Some(body) => (200, vec![], body.clone()),
        None => (404, vec![], br#"{"errors":[{"code":"X","message":"no\u001b such thing"}]}"#.to_vec()),
    }
}

/// Imports an image; returns the digest that its reference stands for.
fn pull(address: &str, version: &str, logins: Option<&str>) -> Result<Digest, OciError> {
    let runtime = Runtime::new().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.json");
    if let Some(password) = logins {
        let auth = data_encoding::BASE64.encode(format!("user:{password}").as_bytes());
        fs::write(&file, json!({ "auths": { (address): { "auth": auth } } }).to_string()).unwrap();
    }
    let reference = Reference::parse(&format!("{address}/a{version}"), false).unwrap();
    let registry = Registry::new(reference, Some(file), runtime.handle().clone())?;
    let (digest, manifest) = registry.resolve(&"linux/amd64".parse().unwrap())?;
    import(&Store::memory(), &registry, &manifest, Limits::default())?;
    Ok(digest)
}

#[test]
fn an_image_is_pulled_by_tag_and_by_digest() {
    let (all, digest) = image();
    let address = serve(move |_, path, _| found(&all, path));
    assert_eq!(pull(&address, ":t", None).unwrap(), digest);
    assert_eq!(pull(&address, &format!("@{digest}"), None).unwrap(), digest);
    let error = pull(&address, ":none", None).unwrap_err().to_string();
    assert!(
        error.starts_with("the registry answers 404 for oci://") && error.ends_with(": no\\u{1b} such thing"),
        "{error}"
    );
}

#[test]
fn every_answer_must_have_the_digest_that_was_asked_for() {
    let (all, digest) = image();
    for changed in all.keys().filter(|path| !path.ends_with("/t")) {
        let mut wrong = all.clone();
        wrong.get_mut(changed).unwrap().push(b' ');
        let address = serve(move |_, path, _| found(&wrong, path));
        let error = pull(&address, &format!("@{digest}"), None).unwrap_err();
        assert!(matches!(error, OciError::Digest { .. }), "{changed}: {error:?}");
    }
    let address = serve(|_, _, _| (200, vec![], vec![b' '; 5 << 20]));
    let error = pull(&address, ":t", None).unwrap_err().to_string();
    assert!(error.contains("must not be larger than 4194304 bytes"), "{error}");
}

#[test]
fn a_layer_that_breaks_off_is_an_error() {
    let (all, _) = image();
    let address = serve(move |_, path, _| {
        let (status, mut headers, mut body) = found(&all, path);
        if body.len() == 1024 {
            headers.push("content-length: 1024".to_owned());
            body.truncate(100);
        }
        (status, headers, body)
    });
    let error = pull(&address, ":t", None).unwrap_err();
    assert!(matches!(&error, OciError::Read { at, .. } if at == "layer 1 of 1"), "{error:?}");
}

#[test]
fn tokens_are_fetched_with_the_login_and_never_sent_elsewhere() {
    let (all, digest) = image();
    // Another host, as clouds have it, which gets no token.
    let (blobs, elsewhere) = (
        all.clone(),
        serve({
            let all = all.clone();
            move |_, path, authorization| match authorization {
                None => found(&all, path),
                Some(_) => (400, vec![], vec![]),
            }
        }),
    );
    let basic = format!("Basic {}", data_encoding::BASE64.encode(b"user:right"));
    let address = serve(move |own, path, authorization| match path.split_once('?') {
        Some(("/token", query)) if query.contains("scope=repository%3Aa%3Apull") && query.contains("service=s") => {
            match authorization {
                Some(given) if given == basic => (200, vec![], br#"{"token":"secret"}"#.to_vec()),
                _ => (401, vec![], vec![]),
            }
        }
        _ if authorization != Some("Bearer secret") => {
            (401, vec![format!("www-authenticate: Bearer realm=\"http://{own}/token\",service=\"s\"")], vec![])
        }
        _ if blobs.contains_key(path) && path.contains("/blobs/") => {
            // By another name of the same host: for the client that is another one.
            let elsewhere = elsewhere.replace("127.0.0.1", "localhost");
            (307, vec![format!("location: http://{elsewhere}{path}")], vec![])
        }
        _ => found(&blobs, path),
    });
    assert_eq!(pull(&address, ":t", Some("right")).unwrap(), digest);
    for (logins, words) in [(None, "wants a login"), (Some("wrong"), "refuses the one in Docker's configuration")] {
        let error = pull(&address, ":t", logins).unwrap_err();
        assert!(matches!(error, OciError::Login { .. }) && error.to_string().contains(words), "{error:?}");
    }
}

#[test]
fn passwords_are_sent_where_a_registry_asks_for_them() {
    let (all, digest) = image();
    let basic = format!("Basic {}", data_encoding::BASE64.encode(b"user:right"));
    let address = serve(move |_, path, authorization| match authorization {
        Some(given) if given == basic => found(&all, path),
        _ => (401, vec!["www-authenticate: Basic realm=\"r\"".to_owned()], vec![]),
    });
    assert_eq!(pull(&address, ":t", Some("right")).unwrap(), digest);
    for logins in [None, Some("wrong")] {
        assert!(matches!(pull(&address, ":t", logins).unwrap_err(), OciError::Login { .. }));
    }
}
