//! What the paths of a cache's URLs name.

use cofferdam_nix::{Hash, OutputId, STORE_DIR, StorePath, base32};
use percent_encoding::percent_decode_str;
use serde::Deserialize;

/// Digits of a store path's hash part.
const HASH_PART: usize = 32;

/// How archives are packed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Compression {
    /// Not at all.
    #[default]
    None,
    /// By zstd.
    Zstd,
}

/// A file of a cache.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// What the cache is.
    CacheInfo,
    /// What is known of the path with this hash part.
    NarInfo(String),
    /// The archive of the path with this hash part, if it has this NAR hash.
    Nar(String, Hash, Compression),
    /// What an output has become.
    Realisation(OutputId),
    /// The log of a derivation.
    Log(StorePath),
}

impl Route {
    /// Reads the path of a URL.
    pub(super) fn parse(path: &str) -> Option<Self> {
        let path = path.strip_prefix('/')?;
        if path == "nix-cache-info" {
            return Some(Self::CacheInfo);
        }
        if let Some(hash_part) = path.strip_suffix(".narinfo") {
            return is_hash_part(hash_part).then(|| Self::NarInfo(hash_part.to_owned()));
        }
        if let Some(name) = path.strip_prefix("nar/") {
            let (name, compression) = match name.strip_suffix(".zst") {
                Some(name) => (name, Compression::Zstd),
                None => (name, Compression::None),
            };
            let (hash_part, nar_hash) = name.strip_suffix(".nar")?.split_once('-')?;
            let nar_hash = Hash::parse(cofferdam_nix::Algorithm::Sha256, nar_hash).ok()?;
            return is_hash_part(hash_part).then(|| Self::Nar(hash_part.to_owned(), nar_hash, compression));
        }
        if let Some(name) = path.strip_prefix("realisations/") {
            let id = percent_decode_str(name.strip_suffix(".doi")?).decode_utf8().ok()?;
            return id.parse().ok().map(Self::Realisation);
        }
        let name = percent_decode_str(path.strip_prefix("log/")?).decode_utf8().ok()?;
        let derivation = StorePath::from_base_name(&name).ok()?;
        derivation.is_derivation().then_some(Self::Log(derivation))
    }
}

/// The URL of an archive, below the cache's.
pub(super) fn nar_url(path: &StorePath, nar_hash: &Hash, compression: Compression) -> String {
    let suffix = match compression {
        Compression::None => "",
        Compression::Zstd => ".zst",
    };
    format!("nar/{}-{}.nar{suffix}", path.hash_part(), nar_hash.base32())
}

/// What `nix-cache-info` says. A builder is near, so it goes before `cache.nixos.org`, whose priority is 40.
pub(super) fn cache_info() -> String {
    format!("StoreDir: {STORE_DIR}\nWantMassQuery: 1\nPriority: 30\n")
}

fn is_hash_part(text: &str) -> bool {
    text.len() == HASH_PART && text.bytes().all(base32::is_digit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: &str = "ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48";

    #[test]
    fn a_route_is_read_as_it_is_written() {
        let path = StorePath::from_base_name(&format!("{PART}-a")).unwrap();
        let hash = Hash::of(b"");
        for compression in [Compression::None, Compression::Zstd] {
            let url = format!("/{}", nar_url(&path, &hash, compression));
            assert_eq!(Route::parse(&url), Some(Route::Nar(PART.to_owned(), hash.clone(), compression)));
        }
        assert_eq!(Route::parse("/nix-cache-info"), Some(Route::CacheInfo));
        assert_eq!(Route::parse(&format!("/{PART}.narinfo")), Some(Route::NarInfo(PART.to_owned())));
        let id = OutputId { derivation: hash, output: "out".to_owned() };
        for text in [id.to_string(), id.to_string().replace('!', "%21").replace(':', "%3A")] {
            assert_eq!(Route::parse(&format!("/realisations/{text}.doi")), Some(Route::Realisation(id.clone())));
        }
        let derivation = StorePath::from_base_name(&format!("{PART}-a?b+c.drv")).unwrap();
        assert_eq!(Route::parse(&format!("/log/{PART}-a%3Fb+c.drv")), Some(Route::Log(derivation)));
    }

    #[test]
    fn other_paths_name_nothing() {
        let long = "a".repeat(10_000);
        for path in [
            "",
            "/",
            "*",
            "nix-cache-info",
            "//nix-cache-info",
            "/nix-cache-info/",
            "/./nix-cache-info",
            "/.narinfo",
            &format!("/{PART}"),
            &format!("/{PART}.narinfo/"),
            &format!("/{PART}a.narinfo"),
            &format!("/../{PART}.narinfo"),
            &format!("/{}.narinfo", &PART[1..]),
            &format!("/{}.narinfo", PART.to_uppercase()),
            &format!("/{}\0.narinfo", &PART[1..]),
            &format!("/{long}.narinfo"),
            &format!("/nar/{PART}.nar"),
            &format!("/nar/{PART}-{PART}.nar"),
            &format!("/nar/{PART}-{}.nar.xz", Hash::of(b"").base32()),
            &format!("/nar/../{PART}-{}.nar", Hash::of(b"").base32()),
            &format!("/nar/{PART}-{long}.nar"),
            &format!("/realisations/sha256:{}!out", Hash::of(b"").base16()),
            &format!("/realisations/sha256:{}!..%2f.doi", Hash::of(b"").base16()),
            &format!("/realisations/sha256:{PART}!out.doi"),
            &format!("/realisations/{long}!out.doi"),
            &format!("/log/{PART}-a"),
            &format!("/log/{PART}-%ff.drv"),
            &format!("/log/{PART}-..%2f.drv"),
            &format!("/log/..%2f..%2f{PART}-a.drv"),
            &format!("/log/{PART}-{long}.drv"),
            "/log/../../etc/passwd",
        ] {
            assert_eq!(Route::parse(path), None, "{path}");
        }
    }
}
