//! The time at the beginning of each line of a build's log: when the line's first byte came to this process.

use std::time::SystemTime;

/// Puts times into one stream, which may be split anywhere.
#[derive(Default)]
pub(super) struct Timestamps {
    /// Whether the last line is still incomplete.
    within_line: bool,
}

impl Timestamps {
    /// The next bytes with their times. Without a time, for what was written before anyone watched, the time is `-`.
    pub(super) fn stamp(&mut self, bytes: &[u8], time: Option<SystemTime>) -> Vec<u8> {
        let time = time.map_or_else(|| "-".to_owned(), |time| humantime::format_rfc3339_millis(time).to_string());
        let mut stamped = Vec::with_capacity(bytes.len() + time.len() + 1);
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            if !self.within_line {
                stamped.extend_from_slice(time.as_bytes());
                stamped.push(b' ');
            }
            stamped.extend_from_slice(line);
            self.within_line = line.last() != Some(&b'\n');
        }
        stamped
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_line_has_the_time_of_its_first_byte() {
        let at = |ms| Some(SystemTime::UNIX_EPOCH + Duration::from_millis(ms));
        let mut timestamps = Timestamps::default();
        let pieces: [(&[u8], _); 5] =
            [(b"before\n", None), (b"a\nb", at(1)), (b"", at(2)), (b"b\n", at(3)), (b"\n\xff", at(86_400_004))];
        let stamped: Vec<u8> = pieces.iter().flat_map(|(bytes, time)| timestamps.stamp(bytes, *time)).collect();
        let expected = b"- before\n\
            1970-01-01T00:00:00.001Z a\n1970-01-01T00:00:00.001Z bb\n\
            1970-01-02T00:00:00.004Z \n1970-01-02T00:00:00.004Z \xff";
        assert_eq!(stamped.escape_ascii().to_string(), expected.escape_ascii().to_string());
    }
}
