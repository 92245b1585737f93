//! Why a program that exists can't be found: the program that it names to run it is missing.

use std::{
    ffi::{CStr, OsStr},
    fs::File,
    io::{self, Read as _},
    os::unix::{ffi::OsStrExt as _, fs::FileExt as _},
    path::Path,
};

/// Most bytes of a script's first line that Linux looks at.
const MAX_FIRST_LINE_BYTES: u64 = 256;

/// Most interpreters that Linux runs for each other.
const MAX_INTERPRETERS: usize = 5;

/// Most program headers to look at.
const MAX_PROGRAM_HEADERS: u64 = 1024;

/// `PT_INTERP` of ELF.
const INTERPRETER_HEADER: u32 = 3;

/// The interpreter or dynamic loader that a program needs and that doesn't exist. Nothing if that isn't why `execve` fails.
pub(crate) fn missing_interpreter(program: &CStr) -> Option<String> {
    let mut program = program.to_bytes().to_vec();
    for _ in 0..MAX_INTERPRETERS {
        let path = Path::new(OsStr::from_bytes(&program));
        // Anything else could block.
        let is_file = path.metadata().is_ok_and(|metadata| metadata.is_file());
        let interpreter = File::open(path).ok().filter(|_| is_file).and_then(|file| interpreter(&file).ok()?)?;
        if matches!(Path::new(OsStr::from_bytes(&interpreter)).try_exists(), Ok(false)) {
            return Some(String::from_utf8_lossy(&interpreter).into_owned());
        }
        program = interpreter;
    }
    None
}

/// What a file says is to run it.
fn interpreter(file: &File) -> io::Result<Option<Vec<u8>>> {
    let mut beginning = Vec::new();
    file.take(MAX_FIRST_LINE_BYTES).read_to_end(&mut beginning)?;
    match &beginning[..] {
        [b'#', b'!', rest @ ..] => Ok(of_script(rest)),
        [0x7f, b'E', b'L', b'F', class, 1, ..] => of_elf(file, *class == 2),
        _ => Ok(None),
    }
}

/// The first word of a script's first line, after `#!`. A carriage return is part of it, as Linux has it.
fn of_script(line: &[u8]) -> Option<Vec<u8>> {
    let line = line.split(|byte| *byte == b'\n').next()?;
    let is_blank = |byte: &u8| *byte == b' ' || *byte == b'\t';
    line.split(is_blank).find(|word| !word.is_empty()).map(<[u8]>::to_vec)
}

/// `PT_INTERP` of a little-endian ELF file.
fn of_elf(file: &File, is_64: bool) -> io::Result<Option<Vec<u8>>> {
    let (table_at, entry_bytes_at, offset_at, size_at) = if is_64 { (32, 54, 8, 32) } else { (28, 42, 4, 16) };
    let word = |at: u64| if is_64 { number::<8>(file, at) } else { number::<4>(file, at) };
    let table = word(table_at)?;
    let entry_bytes = number::<2>(file, entry_bytes_at)?;
    let entries = number::<2>(file, entry_bytes_at + 2)?;
    for entry in (0..entries.min(MAX_PROGRAM_HEADERS)).map(|entry| table.saturating_add(entry * entry_bytes)) {
        if number::<4>(file, entry)? == u64::from(INTERPRETER_HEADER) {
            let size = word(entry.saturating_add(size_at))?.min(libc::PATH_MAX as u64);
            let mut path = vec![0; size as usize];
            file.read_exact_at(&mut path, word(entry.saturating_add(offset_at))?)?;
            return Ok(path.split(|byte| *byte == 0).next().map(<[u8]>::to_vec));
        }
    }
    Ok(None)
}

/// A little-endian number of `N` bytes, at most eight.
fn number<const N: usize>(file: &File, at: u64) -> io::Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes[..N], at)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use std::{ffi::CString, fs, os::unix::ffi::OsStrExt as _};

    use proptest::prelude::*;

    use super::*;

    /// What a program with these contents lacks.
    fn missing(contents: &[u8]) -> Option<String> {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        fs::write(&program, contents).unwrap();
        missing_interpreter(&CString::new(program.as_os_str().as_bytes()).unwrap())
    }

    #[test]
    fn a_script_names_its_interpreter() {
        for (script, expected) in [
            ("#!/nowhere/python3 -E\n", Some("/nowhere/python3")),
            ("#! \t/nowhere/sh", Some("/nowhere/sh")),
            ("#!/bin/sh\r\necho\r\n", Some("/bin/sh\r")),
            ("#!/bin/sh\n", None),
            ("#!\n", None),
            ("echo", None),
            ("", None),
        ] {
            assert_eq!(missing(script.as_bytes()).as_deref(), expected, "{script:?}");
        }
    }

    /// A dynamic program of one program header.
    fn elf(is_64: bool, loader: &[u8]) -> Vec<u8> {
        let mut elf = vec![0; 256];
        elf[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 1 + u8::from(is_64), 1]);
        let (table_at, sizes_at, entry_bytes, offset_at, size_at) =
            if is_64 { (32, 54, 56, 8, 32) } else { (28, 42, 32, 4, 16) };
        let (table, path) = (64, 160);
        elf[table_at] = table;
        elf[sizes_at] = entry_bytes;
        elf[sizes_at + 2] = 1;
        let entry = usize::from(table);
        elf[entry] = 3;
        elf[entry + offset_at] = path;
        elf[entry + size_at] = loader.len() as u8;
        elf[usize::from(path)..][..loader.len()].copy_from_slice(loader);
        elf
    }

    #[test]
    fn a_dynamic_program_names_its_loader() {
        for is_64 in [false, true] {
            assert_eq!(missing(&elf(is_64, b"/nowhere/ld.so\0")).as_deref(), Some("/nowhere/ld.so"));
            assert_eq!(missing(&elf(is_64, b"/bin/sh\0")), None);
        }
    }

    #[test]
    fn an_interpreter_may_lack_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let loader = directory.path().join("python");
        fs::write(&loader, elf(true, b"/nowhere/ld.so\0")).unwrap();
        let script = [b"#!", loader.as_os_str().as_bytes(), b"\n"].concat();
        assert_eq!(missing(&script).as_deref(), Some("/nowhere/ld.so"));
    }

    #[test]
    fn interpreters_that_name_each_other_end() {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("script");
        fs::write(&script, [b"#!", script.as_os_str().as_bytes(), b"\n"].concat()).unwrap();
        assert_eq!(missing_interpreter(&CString::new(script.as_os_str().as_bytes()).unwrap()), None);
    }

    proptest! {
        #[test]
        fn no_file_causes_a_panic(is_64: bool, rest in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut elf = vec![0x7f, b'E', b'L', b'F', 1 + u8::from(is_64), 1];
            elf.extend(rest);
            let _ = missing(&elf);
        }
    }
}
