// Names of files and directories in a repository: safe for every file system and for qemu-img, from names that are not.
import Block

/// The layout of one machine's directory: every path in it is made here.
struct MachineLayout: Sendable {
    /// The machine's directory.
    let path: String

    var identity: String { "\(path)/machine.json" }
    var points: String { "\(path)/points" }
    var documents: String { "\(path)/documents" }
    var disks: String { "\(path)/disks" }
    var locks: String { "\(path)/locks" }
    var marks: String { "\(path)/marks" }

    /// Held by a run or by pruning: one of them at a time.
    var machineLock: String { "\(locks)/machine" }
    /// Held shared while a chain is opened or verified, exclusively while pruning gives files other names.
    var namesLock: String { "\(locks)/names" }
    /// Held shared while a point is read, exclusively while it is removed.
    func pointLock(_ sequence: Int) -> String { "\(locks)/\(sequenceText(sequence))" }

    func manifest(_ sequence: Int, _ time: UTCTime) -> String {
        "\(points)/\(sequenceText(sequence))-\(time.compact).json"
    }
    func disk(_ directory: String) -> String { "\(disks)/\(directory)" }
    func data(_ directory: String, _ sequence: Int, _ driver: StorageDriver) -> String {
        "\(disk(directory))/\(dataName(sequence, driver))"
    }
    func hashes(_ directory: String, _ name: String) -> String { "\(disk(directory))/\(name)" }
    func document(_ name: String) -> String { "\(documents)/\(name)" }
    func mark(_ sequence: Int, _ kind: PointMark.Kind) -> String {
        "\(marks)/\(sequenceText(sequence)).\(kind.rawValue)"
    }
}

/// 000042: at least six digits, so that names sort as numbers do for a million points.
func sequenceText(_ sequence: Int) -> String { padded(sequence, 6) }

/// The number at the start of a name, before a point, a dash or its end; nil where there is none of at least 6 digits.
func sequence(ofName name: String) -> Int? {
    let digits = name.utf8.prefix { (48...57).contains($0) }
    guard (6...15).contains(digits.count) else { return nil }
    if let next = name.utf8.dropFirst(digits.count).first, next != UInt8(ascii: "."), next != UInt8(ascii: "-") {
        return nil
    }
    return Int(String(decoding: digits, as: UTF8.self))
}

/// The name of the file with a disk's data at a point.
func dataName(_ sequence: Int, _ driver: StorageDriver) -> String {
    "\(sequenceText(sequence)).\(driver == .qcow2 ? "qcow2" : "raw")"
}

/// The name of the sidecar with the hashes of a disk's data at a point.
///
/// - Parameter merges: how many earlier points were merged into this one.
func hashesName(_ sequence: Int, merges: Int) -> String {
    sequenceText(sequence) + (merges == 0 ? "" : ".\(merges)") + ".hashes"
}

/// The directory of a machine: its name with everything but ASCII letters, digits, points, dashes and underscores
/// replaced by underscores, at most 60 characters of it, a dash, and the first digits of the SHA-256 of its id.
///
/// - Parameter digits: 8, or 16 where two machines would have the same.
/// - Throws: `.unsupported` without OpenSSL.
func machineDirectory(id: String, name: String, digits: Int = 8) throws(BlockError) -> String {
    "\(safeName(name, or: "machine"))-\(try sha256(Array(id.utf8)).prefix(digits))"
}

/// The directory of a disk: its id, if that is a safe name; otherwise its id with unsafe characters replaced, a dash,
/// and the first 8 digits of the id's SHA-256.
///
/// - Throws: `.unsupported` without OpenSSL.
func diskDirectory(id: String) throws(BlockError) -> String {
    let safe = safeName(id, or: "disk")
    // Names that differ in case only are the same to some file systems.
    return safe == id && id == id.lowercased() ? id : "\(safe)-\(try sha256(Array(id.utf8)).prefix(8))"
}

/// A plain file name from any text.
func safeName(_ text: String, or substitute: String) -> String {
    var safe = ""
    for scalar in text.unicodeScalars.prefix(60) {
        let isSafe =
            scalar.isASCII && (scalar.properties.isAlphabetic || "0123456789._-".unicodeScalars.contains(scalar))
        safe.unicodeScalars.append(isSafe ? scalar : "_")
    }
    // Neither hidden, nor like an option.
    if let first = safe.first, ".-".contains(first) { safe = "_" + safe.dropFirst() }
    return safe.allSatisfy({ $0 == "_" }) ? substitute : safe
}
