//! Sparse files in PAX archives: GNU tar's three versions of it, which bsdtar writes, too.
//!
//! | version | map of the data | name |
//! |---|---|---|
//! | 0.0 | a record for each offset and length | the entry's |
//! | 0.1 | the record `GNU.sparse.map` | the record `GNU.sparse.name` |
//! | 1.0 | decimal lines before the data, padded to a block | the record `GNU.sparse.name` |
//!
//! See "Storing Sparse Files" in GNU tar's manual.

use std::io::{self, Read};

use super::read::MAX_HEADER_BYTES;

/// Prefix of the keys that describe a sparse file.
pub(super) const PREFIX: &str = "GNU.sparse.";

/// Length of a tar archive's blocks, in bytes.
const BLOCK_BYTES: u64 = 512;

/// What an entry's PAX records say of a sparse file.
#[derive(Debug, Default)]
pub(super) struct Sparse {
    is_one: bool,
    /// The path, where the entry's own is made up.
    pub(super) name: Option<Vec<u8>>,
    size: Option<u64>,
    /// Offsets and lengths, in turn.
    map: Vec<u64>,
    map_comes_first: bool,
}

impl Sparse {
    /// Takes one record in. Those of other matters have no effect.
    ///
    /// # Errors
    ///
    /// A number that is none.
    pub(super) fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        let Some(what) = key.strip_prefix(PREFIX.as_bytes()) else { return Ok(()) };
        self.is_one = true;
        match what {
            b"name" => self.name = Some(value.to_owned()),
            b"size" | b"realsize" => self.size = Some(number(value)?),
            b"offset" | b"numbytes" => self.map.push(number(value)?),
            b"map" if value.is_empty() => {}
            b"map" => {
                let map: Result<_, _> = value.split(|byte| *byte == b',').map(number).collect();
                self.map = map?;
            }
            b"major" => self.map_comes_first = number(value)? == 1,
            // The number of the map's entries, and the minor version.
            _ => {}
        }
        Ok(())
    }

    /// Whether there was such a record.
    pub(super) fn is_one(&self) -> bool {
        self.is_one
    }

    /// The size of the whole file, and its bytes, of which `stored` are in `data`.
    ///
    /// # Errors
    ///
    /// The rule that the map breaks.
    pub(super) fn expand<R: Read>(self, mut data: R, mut stored: u64) -> Result<(u64, Expanded<R>), String> {
        let size = self.size.ok_or("it has no size")?;
        let numbers = if self.map_comes_first { read_map(&mut data, &mut stored)? } else { self.map };
        let (pairs, []) = numbers.as_chunks::<2>() else {
            return Err("its map has an offset without a length".to_owned());
        };
        let (mut end, mut bytes) = (0, 0);
        for &[offset, length] in pairs {
            if offset < end {
                return Err("the parts of its map overlap or are out of order".to_owned());
            }
            end = offset.checked_add(length).filter(|end| *end <= size).ok_or("its map goes beyond its end")?;
            bytes += length;
        }
        if bytes != stored {
            return Err(format!("its map has {bytes} bytes of data, and the archive {stored}"));
        }
        let parts = pairs.to_vec();
        Ok((size, Expanded { data, parts: parts.into_iter(), part: None, position: 0, size }))
    }
}

fn number(text: &[u8]) -> Result<u64, String> {
    let parsed = str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    parsed.ok_or_else(|| format!("\"{}\" in its description is no number", text.escape_ascii()))
}

/// The map at the beginning of the data, which is a count and so many pairs, a number a line.
fn read_map(data: &mut impl Read, stored: &mut u64) -> Result<Vec<u64>, String> {
    let mut numbers = Vec::new();
    let (mut line, mut wanted, mut read) = (Vec::new(), None, 0);
    while wanted.is_none_or(|wanted| (numbers.len() as u64) < wanted) {
        let mut block = [0; BLOCK_BYTES as usize];
        data.read_exact(&mut block).map_err(|error| format!("its map can't be read: {error}"))?;
        read += BLOCK_BYTES;
        if read > MAX_HEADER_BYTES {
            return Err(format!("its map exceeds {MAX_HEADER_BYTES} bytes"));
        }
        for &byte in &block {
            if wanted.is_some_and(|wanted| numbers.len() as u64 == wanted) {
                break;
            }
            if byte != b'\n' {
                line.push(byte);
                continue;
            }
            let number = number(&line)?;
            line.clear();
            match wanted {
                None => wanted = Some(number.checked_mul(2).ok_or("its map is too long")?),
                Some(_) => numbers.push(number),
            }
        }
    }
    *stored = stored.checked_sub(read).ok_or("its map is longer than the entry")?;
    Ok(numbers)
}

/// The bytes of a whole sparse file: its data, and zeros between.
pub(super) struct Expanded<R> {
    data: R,
    parts: std::vec::IntoIter<[u64; 2]>,
    /// The current part, or the next: offset and length.
    part: Option<[u64; 2]>,
    position: u64,
    size: u64,
}

impl<R: Read> Read for Expanded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let is_over = |[offset, length]: [u64; 2]| self.position >= offset + length;
        if self.part.is_none_or(is_over) {
            self.part = self.parts.find(|[_, length]| *length > 0);
        }
        let (is_data, end) = match self.part {
            Some([offset, length]) if self.position >= offset => (true, offset + length),
            Some([offset, _]) => (false, offset),
            None => (false, self.size),
        };
        let most = usize::try_from(end.saturating_sub(self.position)).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        let buffer = &mut buffer[..most];
        let read = if is_data {
            self.data.read(buffer)?
        } else {
            buffer.fill(0);
            most
        };
        self.position += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn expanded(sparse: Sparse, data: &[u8]) -> Result<Vec<u8>, String> {
        let (size, mut whole) = sparse.expand(data, data.len() as u64)?;
        let mut bytes = Vec::new();
        whole.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, size);
        Ok(bytes)
    }

    fn sparse(records: &[(&str, &str)]) -> Result<Sparse, String> {
        let mut sparse = Sparse::default();
        for (key, value) in records {
            sparse.record(format!("{PREFIX}{key}").as_bytes(), value.as_bytes())?;
        }
        Ok(sparse)
    }

    #[test]
    fn a_wrong_description_is_refused_with_its_rule() {
        let wrong = |records: &[(&str, &str)], data: &[u8]| {
            sparse(records).and_then(|sparse| expanded(sparse, data)).unwrap_err()
        };
        for (records, data, words) in [
            (&[("map", "0,1")][..], "x", "no size"),
            (&[("size", "9"), ("map", "0,1,2")], "x", "offset without a length"),
            (&[("size", "9"), ("map", "0,2,1,1")], "xyz", "overlap"),
            (&[("size", "9"), ("map", "8,2")], "xy", "beyond its end"),
            (&[("size", "9"), ("map", "1,18446744073709551615")], "xy", "beyond its end"),
            (&[("size", "9"), ("map", "0,2")], "x", "2 bytes of data, and the archive 1"),
            (&[("size", "nine")], "", "\"nine\" in its description is no number"),
            (&[("realsize", "9"), ("major", "1")], "1\n0\n1\n", "can't be read"),
        ] {
            let error = wrong(records, data.as_bytes());
            assert!(error.contains(words), "{records:?}: {error}");
        }
        let mut endless = vec![b'1'; 2 << 20];
        assert!(wrong(&[("realsize", "9"), ("major", "1")], &endless).contains("exceeds"));
        endless[..21].copy_from_slice(b"18446744073709551615\n");
        assert!(wrong(&[("realsize", "9"), ("major", "1")], &endless).contains("too long"));
    }

    proptest! {
        #[test]
        fn every_version_gives_the_same_bytes(parts in proptest::collection::vec((0_u64..2000, 0_usize..2000), 0..300), tail in 0_u64..100) {
            let (mut whole, mut data, mut map) = (Vec::new(), Vec::new(), Vec::new());
            for (number, (hole, length)) in parts.into_iter().enumerate() {
                whole.resize(whole.len() + usize::try_from(hole).unwrap(), 0);
                map.push((whole.len(), length));
                let part = vec![u8::try_from(number % 255).unwrap() + 1; length];
                whole.extend_from_slice(&part);
                data.extend_from_slice(&part);
            }
            whole.resize(whole.len() + usize::try_from(tail).unwrap(), 0);
            let size = whole.len().to_string();
            let listed: Vec<_> = map.iter().map(|(offset, length)| format!("{offset},{length}")).collect();
            let records = [("size", &*size), ("map", &listed.join(","))];
            prop_assert_eq!(&expanded(sparse(&records).unwrap(), &data).unwrap(), &whole);

            let mut old = sparse(&[("size", &size)]).unwrap();
            for (offset, length) in &map {
                old.record(b"GNU.sparse.offset", offset.to_string().as_bytes()).unwrap();
                old.record(b"GNU.sparse.numbytes", length.to_string().as_bytes()).unwrap();
            }
            prop_assert_eq!(&expanded(old, &data).unwrap(), &whole);

            let lines: String = map.iter().map(|(offset, length)| format!("{offset}\n{length}\n")).collect();
            let mut with_map = format!("{}\n{lines}", map.len()).into_bytes();
            with_map.resize(with_map.len().next_multiple_of(512), 0);
            with_map.extend_from_slice(&data);
            let new = sparse(&[("realsize", &size), ("major", "1"), ("minor", "0")]).unwrap();
            prop_assert_eq!(&expanded(new, &with_map).unwrap(), &whole);
        }
    }
}
