// Swagger UI over the service's own OpenAPI document. Its files come from the Python package fastapi-offline.

/** Problem types are URLs such as /docs#problem-bad-parameter. Their rows exist only after Swagger UI has rendered. */
function scrollToProblem() {
  const id = location.hash.replace(/^#\/?/, ""); // deep linking rewrites #problem-x to #/problem-x
  if (id.startsWith("problem-")) document.getElementById(id)?.scrollIntoView();
}

SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  validatorUrl: null, // the default validator is on another host
  onComplete: scrollToProblem,
});
addEventListener("hashchange", scrollToProblem);
