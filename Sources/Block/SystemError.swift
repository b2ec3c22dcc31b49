// Turns errno values into error kinds and texts; the only place that knows both.
import Glibc

/// The system's text for a positive `errno` value, for example "No such file or directory".
public func systemErrorText(_ errorNumber: Int32) -> String {
    var buffer = [CChar](repeating: 0, count: 256)
    guard let text = strerror_r(errorNumber, &buffer, buffer.count) else { return "error \(errorNumber)" }
    return String(cString: text)
}

extension BlockError.Kind {
    /// The kind that stands for a positive `errno` value; everything unknown is an input/output error.
    public init(errno errorNumber: Int32) {
        switch errorNumber {
        case ENOSPC, EDQUOT, EFBIG: self = .noSpace
        case EROFS, EPERM: self = .readOnly
        case EACCES: self = .denied
        case EINVAL: self = .invalid
        case EOPNOTSUPP, ENOTSUP, ENOSYS, ENOTTY: self = .unsupported
        case EOVERFLOW: self = .tooLarge
        case ENOMEM: self = .noMemory
        case ESHUTDOWN, ENODEV, ENXIO: self = .shutdown
        case ENOENT: self = .notFound
        default: self = .inputOutput
        }
    }
}
