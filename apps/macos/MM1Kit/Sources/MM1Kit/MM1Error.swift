import Foundation

/// Why a server did not answer, or not to the end.
///
/// A cancelled task throws `CancellationError` instead.
public enum MM1Error: Error, Sendable, Hashable {
    /// The server said no.
    case refused(Refusal)
    /// There is no server at this address, or none that can be reached.
    case unreachable(String)
    /// The connection ended before the answer did; what came of it is no whole answer.
    case interrupted(String)
    /// What came is not what `mm1 serve` sends.
    case malformed(String)
}

/// What a server says where it does not answer.
public struct Refusal: Sendable, Hashable {
    /// Of HTTP; 200 where an answer that had begun was broken off.
    public let status: Int
    /// One sentence.
    public let message: String
    /// Names the fault for programs: `invalid_api_key`, `queue_full`, ...
    public let code: String?
    /// The field of the request that is at fault.
    public let param: String?
    /// Seconds after which it may be asked again.
    public let retryAfter: Double?
    /// What the server's log calls the request.
    public let requestID: String?
}

extension MM1Error: LocalizedError {
    public var errorDescription: String? {
        switch self {
        case .refused(let refusal): refusal.message
        case .unreachable(let reason): "the server cannot be reached: \(reason)"
        case .interrupted(let reason): "the answer broke off: \(reason)"
        case .malformed(let reason): "the server's reply is not understood: \(reason)"
        }
    }
}

/// The object that stands for an error in replies and streams.
struct ErrorReply: Decodable {
    struct Fault: Decodable {
        let message: String
        let code: String?
        let param: String?
    }

    let error: Fault

    func refusal(_ head: Head) -> Refusal {
        Refusal(
            status: head.status,
            message: error.message,
            code: error.code,
            param: error.param,
            retryAfter: head["Retry-After"].flatMap(Double.init),
            requestID: head["X-Request-Id"]
        )
    }
}

extension Refusal {
    /// A refusal by its head and body; a proxy or a full server may send none of ours.
    init(_ head: Head, body: Data) {
        if let reply = try? JSONDecoder().decode(ErrorReply.self, from: body) {
            self = reply.refusal(head)
            return
        }
        let fault = ErrorReply.Fault(message: "HTTP status \(head.status)", code: nil, param: nil)
        self = ErrorReply(error: fault).refusal(head)
    }
}
